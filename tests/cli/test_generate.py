"""`recipe generate` and `recipe chat` on a pico graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paring.cli.chat import _own_settings
from paring.errors import GraphError

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}a"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer without torch: random weights, a token for every byte."""
    import numpy as np

    from paring.engine.export import export

    folder = tmp_path_factory.mktemp("pico")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (256, 32),
        f"{layer}.self_attn.q_proj": (32, 32),
        f"{layer}.self_attn.k_proj": (16, 32),
        f"{layer}.self_attn.v_proj": (16, 32),
        f"{layer}.self_attn.o_proj": (32, 32),
        f"{layer}.mlp.gate_proj": (48, 32),
        f"{layer}.mlp.up_proj": (48, 32),
        f"{layer}.mlp.down_proj": (32, 48),
        f"{layer}.input_layernorm": (32,),
        f"{layer}.post_attention_layernorm": (32,),
        "model.norm": (32,),
    }
    tensors = {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    export(folder)
    return folder


def recipe(*words: object, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paring", *map(str, words)]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, encoding="utf-8", timeout=60
    )


def test_generate_prints_the_text_then_its_speed(checkpoint: Path) -> None:
    done = recipe("generate", checkpoint, "Hello", "-n", 8)
    assert done.returncode == 0
    assert done.stdout.startswith("Hello")
    assert "answer 8 tokens" in done.stderr
    told = json.loads(recipe("generate", checkpoint, "Hello", "-n", 8, "--json").stdout)
    assert "Hello" + told["text"] + "\n" == done.stdout
    assert told["finish_reason"] == "length"
    assert len(told["tokens"]) == told["timings"]["tokens"] == 8
    piped = recipe("generate", checkpoint / "graph", "-", "-n", 8, said="Hello")
    assert piped.stdout == done.stdout


def test_bad_input_ends_with_a_message(checkpoint: Path, tmp_path: Path) -> None:
    for words in (
        (tmp_path, "Hello"),
        (checkpoint, ""),
        (checkpoint, "x" * 65),
        (checkpoint, "Hello", "--kernels", "none"),
        (checkpoint, "Hello", "--top-p", "2"),
    ):
        done = recipe("generate", *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.strip()
        assert "Traceback" not in done.stderr


def test_text_that_is_not_utf8_is_told(checkpoint: Path) -> None:
    for words in (("generate", checkpoint, "-"), ("chat", checkpoint)):
        done = subprocess.run(
            [sys.executable, "-m", "paring", *map(str, words)],
            input=b"a\xff\n",
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            timeout=60,
        )
        assert done.returncode == 2
        assert b"not UTF-8 text" in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_conversation_draws_as_the_model_says(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"temperature": 0.5, "top_k": 4, "do_sample": True, "min_p": 0.1}
    assert _own_settings(own, "out") == {"temperature": 0.5, "top_k": 4}
    assert "min_p: not known to the engine" in capsys.readouterr().err
    assert _own_settings({**own, "do_sample": False}, "out")["temperature"] == 0
    for wrong in ({"temperature": "hot"}, {"top_k": 1.5}, {"top_p": [1]}, {"top_p": True}):
        with pytest.raises(GraphError, match=r"out: generation\.\w+ is .*; it must be a number"):
            _own_settings(wrong, "out")


def test_a_conversation_goes_on_until_it_is_left(checkpoint: Path) -> None:
    said = "first\nsecond\n/clear\n" + "x" * 70 + "\nthird\n/exit\nnever"
    done = recipe("chat", checkpoint, "-n", 5, "--temperature", 0, said=said)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("prompt ")]
    assert len(lines) == 3  # the message of 70 tokens has no place
    assert lines[0].startswith("prompt 7 tokens")  # "ufirsta"
    assert lines[2].startswith("prompt 7 tokens")  # "uthirda", after /clear
    assert "context length is 64" in done.stderr
