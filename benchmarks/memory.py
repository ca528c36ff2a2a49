"""Peak memory of a one-shot run over a model of TinyLlama's shape (1.1B parameters, random weights).

    python benchmarks/memory.py --work DIR [--layers 22] [--samples 8] [--thorough 4]

Makes the model in DIR (bfloat16, 2.2 GB) if it is not there, then runs `recipe apply` on it in a process of its own:
loading, pruning, block reconstruction, quantization, the journal of finished blocks, checkpoint and graph. Prints one
JSON object. `peak_bytes` is the largest resident set the kernel saw, with mapped files; `peak_private_bytes` is the
largest part of it that could not be dropped, sampled every 50 ms.

Pruning is SparseGPT in the first `--thorough` blocks and Wanda in the others: the time goes down, the peak does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GIB = 2**30
LENGTH = 512


def text(words: int) -> str:
    choose = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return " ".join(
        "".join(choose.choices(syllables, k=choose.randint(1, 3))) for _ in range(words)
    )


def make_model(folder: Path, layers: int, **sizes: int) -> None:
    """A Hugging Face folder: random weights, and a small tokenizer made on the spot.

    `sizes` are fields of LlamaConfig other than those of TinyLlama.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text(20000)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    shape = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        **sizes,
    }
    config = LlamaConfig(
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **shape,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, samples: int, thorough: int, layers: int) -> Path:
    (folder / "text.txt").write_text(text(400 * samples * LENGTH // 512))

    def blocks(first: int, last: int) -> str:
        return f"re:.*\\.layers\\.({'|'.join(map(str, range(first, last)))})\\..*_proj"

    modifiers = []
    if thorough:
        modifiers.append({"SparseGPT": {"sparsity": 0.5, "targets": [blocks(0, thorough)]}})
    if thorough < layers:
        modifiers.append({"Wanda": {"sparsity": 0.5, "targets": [blocks(thorough, layers)]}})
    modifiers.append({"BlockReconstruction": {"epochs": 1, "ignore": ["lm_head"]}})
    modifiers.append({"Quantization": {"scheme": "W8A8", "ignore": ["lm_head"]}})
    data = {"dataset": str(folder / "text.txt"), "samples": samples, "length": LENGTH}
    stage = {"name": "pare", "run": "oneshot", "data": data, "modifiers": modifiers}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"version": 1, "stages": [stage]}))
    return file


def private(pid: int) -> int:
    """Bytes of a process's resident memory that no file stands behind; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, type=Path, help="folder for model and result")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of 512 tokens")
    parser.add_argument("--thorough", type=int, default=4, help="blocks pruned by SparseGPT")
    options = parser.parse_args()
    folder = options.work / f"model-{options.layers}"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_model(folder, options.layers)
    file = recipe(options.work, options.samples, options.thorough, options.layers)
    command = [sys.executable, "-m", "paring", "apply", file, "--model", folder, "--no-evaluate"]
    command += ["--output", options.work / "out", "--fresh"]
    began = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, private(process.pid))
        time.sleep(0.05)
    result = {
        "layers": options.layers,
        "samples": options.samples,
        "exit": os.waitstatus_to_exitcode(status),
        "float32_bytes": 4 * 32000 * 2048 * 2 + 4 * options.layers * 44044288,
        "peak_bytes": usage.ru_maxrss * 1024,
        "peak_private_bytes": peak,
        "peak": f"{usage.ru_maxrss * 1024 / GIB:.2f} GiB, private {peak / GIB:.2f} GiB",
        "seconds": round(time.monotonic() - began, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    print(json.dumps(result), flush=True)
    return int(result["exit"])


if __name__ == "__main__":
    sys.exit(main())
