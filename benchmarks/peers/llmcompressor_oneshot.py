"""One llm-compressor case under Paring's accuracy protocol; run it with the peer's own interpreter.

    LLMCOMPRESSOR_PYTHON benchmarks/peers/llmcompressor_oneshot.py CASE --model DIR --data DIR

Calibrates on the first 64 windows of 512 tokens of `wikitext-2/calibration.txt`, evaluates 40 windows of
`wikitext-2/dev.txt`, and prints one JSON line: {"case", "perplexity", "seconds", "zeros"}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def sparsegpt(sparsity: float, structure: str = "0:0") -> list:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return [
        SparseGPTModifier(
            sparsity=sparsity,
            mask_structure=structure,
            targets=["Linear"],
            ignore=["re:.*lm_head.*"],
        )
    ]


def wanda(sparsity: float, structure: str = "0:0") -> list:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return [
        WandaPruningModifier(
            sparsity=sparsity,
            mask_structure=structure,
            targets=["Linear"],
            ignore=["re:.*lm_head.*"],
        )
    ]


def quantize(scheme: str) -> list:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["re:.*lm_head.*"])]


def int4_groups(bits_in: int | None, group: int = 64) -> dict:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group
    )
    inputs = None
    if bits_in:
        inputs = QuantizationArgs(
            num_bits=bits_in, type="int", symmetric=True, strategy="token", dynamic=True
        )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return {"group_0": scheme}


def gptq(bits_in: int | None) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(config_groups=int4_groups(bits_in), ignore=["re:.*lm_head.*"])]


def awq(bits_in: int | None) -> list:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # 0.14 pins memory for a GPU without asking for one
        IntermediatesCache.pin_memory = lambda *args, **options: None
    ignore = ["re:.*lm_head.*"]
    return [AWQModifier(), QuantizationModifier(config_groups=int4_groups(bits_in), ignore=ignore)]


CASES = {
    "dense": list,
    **{f"sparsegpt-{s}": (lambda s=s: sparsegpt(s / 100)) for s in (50, 60, 70, 80)},
    **{f"wanda-{s}": (lambda s=s: wanda(s / 100)) for s in (50, 60)},
    "sparsegpt-2:4": lambda: sparsegpt(0.5, "2:4"),
    "sparsegpt-4:8": lambda: sparsegpt(0.5, "4:8"),
    "sparsegpt-8:16": lambda: sparsegpt(0.5, "8:16"),
    # llm-compressor's N:M prunes N of every M, so 75 % is 12:16
    "sparsegpt-4:16": lambda: sparsegpt(0.75, "12:16"),
    "w8a8-dynamic": lambda: quantize("W8A8"),
    "gptq-w4a16-g64": lambda: gptq(None),
    "awq-w4a16-g64": lambda: awq(None),
    "gptq-w4a8-g64": lambda: gptq(8),
    "awq-w4a8-g64": lambda: awq(8),
    "sparsegpt-50-w8a8": lambda: sparsegpt(0.5) + quantize("W8A8"),
}


def windows(tokenizer: object, file: Path, length: int, count: int) -> torch.Tensor:
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).reshape(count, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(tokenizer, options.data / "wikitext-2/calibration.txt", 512, 64)
    recipe = CASES[options.case]()
    began = time.perf_counter()
    if recipe:
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 512} for row in calibration]
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=recipe,
            max_seq_length=512,
            num_calibration_samples=64,
            shuffle_calibration_samples=False,
        )
    seconds = time.perf_counter() - began
    total, predicted = 0.0, 0
    with torch.no_grad():
        for row in windows(tokenizer, options.data / "wikitext-2/dev.txt", 512, 40):
            logits = model(row[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            predicted += row.numel() - 1
    linears = [m for n, m in model.named_modules() if n.endswith("_proj")]
    zeros = sum((m.weight == 0).sum().item() for m in linears) / sum(
        m.weight.numel() for m in linears
    )
    print(
        json.dumps(
            {
                "case": options.case,
                "perplexity": math.exp(total / predicted),
                "seconds": seconds,
                "zeros": zeros,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
