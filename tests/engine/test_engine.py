"""The whole engine on pico checkpoints: against torch, against itself, and when it is misused."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_interpreter
import torch
from pico_checkpoints import SCHEMES, VOCABULARY
from transformers import AutoModelForCausalLM

from paring.engine import Engine, _core
from paring.engine.export import export
from paring.engine.perplexity import perplexity
from paring.errors import GraphError

RANDOM = np.random.default_rng(5)
TOKENS = RANDOM.integers(0, VOCABULARY, 100).tolist()
LONG = RANDOM.integers(0, VOCABULARY, 300).tolist()
FLOAT_CHANGES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {"head_dim": 24, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6},
]


@pytest.fixture
def engine(llama: Callable[..., Path]) -> Engine:
    return Engine.load(export(llama(max_position_embeddings=400)), threads=2)


@pytest.mark.parametrize("changes", FLOAT_CHANGES, ids=str)
def test_float_logits_are_those_of_torch(
    llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = llama(**changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = Engine.load(export(folder)).logits(TOKENS)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rounding(model) * np.linalg.norm(expected)


def rounding(model: torch.nn.Module) -> float:
    """Relative error of the logits that two orders of summation may differ by.

    A product of k terms in float32 is off by about sqrt(k) eps relative to |W||x|; so is every
    linear and attention on the way, and errors add up like independent ones. 8 for the ratio of
    |W||x| to |Wx| and for the curvature of softmax and gates.
    """
    steps = [
        math.sqrt(module.in_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return 8 * float(np.finfo(np.float32).eps) * math.hypot(*steps)


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_logits_are_those_of_the_plain_interpreter(
    quantized: Callable[..., Path], name: str
) -> None:
    """An activation between two integers may round either way, and what follows moves with it.

    So of single tokens most must agree to float precision, and a sequence roughly. Weight-only
    matrices take 15-bit activations, within 2^-15 of the largest of a group: no such jumps there.
    """
    engine = Engine.load(export(quantized(name)), cache="f32")

    def error(tokens: list[int]) -> float:
        expected = reference_interpreter.logits(engine.graph, tokens)
        return float(np.linalg.norm(engine.logits(tokens) - expected) / np.linalg.norm(expected))

    errors = [error([token]) for token in TOKENS[:9]]
    weight_only = SCHEMES[name].get("inputs", "token") is None
    assert np.median(errors) <= (5e-4 if weight_only else 1e-5)
    assert max(*errors, error(TOKENS[:16])) <= (5e-4 if weight_only else 0.05)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-sparse", "w8a8-static", "w4a16-g32-sparse"])
def test_every_row_and_thread_count_gives_the_same_bits(
    quantized: Callable[..., Path], name: str
) -> None:
    folder = export(quantized(name, max_position_embeddings=400))
    expected = Engine.load(folder, threads=1, kernels="reference").logits(LONG)
    for row in _core.rows():
        for threads in (1, 2, 5):
            found = Engine.load(folder, threads, row).logits(LONG)
            assert np.array_equal(found, expected), (row, threads)


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("name", [None, "w8a8", "w8a16", "w4a16-g32"])
def test_a_prompt_at_once_equals_token_by_token(
    llama: Callable[..., Path], quantized: Callable[..., Path], name: str | None, cache: Any
) -> None:
    make = llama if name is None else lambda **changes: quantized(name, **changes)
    engine = Engine.load(export(make(max_position_embeddings=400)), threads=2, cache=cache)
    expected = engine.logits(LONG)
    state = engine.state()
    for place, token in enumerate(LONG):
        state.append(token)
        assert np.array_equal(state.logits, expected[place]), place
    for split in (1, 127, 128, 129):
        state = engine.state()
        state.extend(np.array(LONG[:split]))
        state.extend(np.array(LONG[split:]))
        assert np.array_equal(state.logits, expected[-1])


def test_rewinding_leaves_no_trace(engine: Engine) -> None:
    state = engine.state()
    state.extend(np.array(LONG))
    prompt = np.array([*LONG[:150], *TOKENS[:30]])
    assert state.rewind(prompt) == 150
    state.extend(prompt[150:])
    assert np.array_equal(state.logits, engine.logits(prompt)[-1])
    assert state.rewind(prompt) == len(prompt) - 1  # the last is computed again, for its logits


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32"])
def test_quantized_graphs_keep_keys_and_values_in_f16(
    quantized: Callable[..., Path], name: str
) -> None:
    folder = export(quantized(name))
    half, full = Engine.load(folder), Engine.load(folder, cache="f32")
    assert (half.info()["cache"]["type"], full.info()["cache"]["type"]) == ("f16", "f32")
    a, b = half.logits(TOKENS), full.logits(TOKENS)
    # Of the size of what one activation rounded the other way does.
    assert 0 < np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b)


def test_an_int8_cache_hardly_changes_perplexity(llama: Callable[..., Path]) -> None:
    """Logits differ, by what rounding to 255 steps may do, and perplexity by under half a percent."""
    folder = export(llama(max_position_embeddings=400))
    full, int8 = Engine.load(folder, cache="f32"), Engine.load(folder, cache="int8")
    a, b = full.logits(LONG), int8.logits(LONG)
    assert 0 < np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(a)
    exact, rounded = (
        perplexity(e.logits, np.array(LONG), window=100, windows=3).value for e in (full, int8)
    )
    assert rounded == pytest.approx(exact, rel=0.005)
    assert rounded != exact
    size, scales = 2 * 2 * 2 * 16, 2 * 2 * 2 * 4  # layers, keys and values, kv heads, bytes of each
    assert int8.info()["cache"] == {
        "type": "int8",
        "bytes_per_token": size + scales,
        "calibrated": None,
    }


def test_info(quantized: Callable[..., Path]) -> None:
    engine = Engine.load(export(quantized("w8a8-sparse")), threads=2, cache="f16")
    info = engine.info()
    assert (info["kernels"], info["threads"]) == (_core.rows()[-1], 2)
    assert info["context"] == 128
    size = 2 * 2 * 32 * 2
    assert info["cache"] == {"type": "f16", "bytes_per_token": size, "calibrated": None}
    matrix = info["matrices"]["model.layers.0.mlp.down_proj.weight"]
    stored = engine.graph.tensors["model.layers.0.mlp.down_proj.weight"]
    assert matrix["sparsity"] == 1 - stored.nonzeros / (64 * 96)  # type: ignore[union-attr]
    assert 0.5 < matrix["sparsity"] < 0.7
    assert info["bytes_per_token"] == sum(m["bytes"] for m in info["matrices"].values())
    assert info["memory"]["tables"] == VOCABULARY * 64 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_does_not_stay_in_memory_beside_the_packed_weights(
    llama: Callable[..., Path],
) -> None:
    folder = export(llama(vocab_size=4096, intermediate_size=512))
    engine = Engine.load(folder)
    found = re.search(r"graph\.safetensors\n(?:\w+:.*\n)*?Rss: +(\d+) kB", maps())
    assert found is not None
    size = (folder / "graph.safetensors").stat().st_size
    assert int(found[1]) * 1024 <= size // 4
    assert np.isfinite(engine.logits([4000, 7])).all()  # what is needed comes back


def maps() -> str:
    return Path("/proc/self/smaps").read_text()


# --- misuse ------------------------------------------------------------------------------------


def test_bad_prompts(engine: Engine) -> None:
    for prompt, message in (
        ([], "empty"),
        ([0, VOCABULARY], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([2**70], "token ids"),
        ([0.5], "integers"),
        ([[1, 2]], "one row"),
        ([0] * 401, "401 tokens, but the model's context length is 400"),
    ):
        with pytest.raises(GraphError, match=message):
            engine.logits(prompt)  # type: ignore[arg-type]
    assert engine.logits([0] * 400).shape == (400, VOCABULARY)


def test_the_core_refuses_what_gets_past_python(engine: Engine) -> None:
    model = engine.model
    sequence = model.sequence()
    one, out = np.zeros(1, np.int64), np.empty((1, VOCABULARY), np.float32)
    read_only = np.empty((1, VOCABULARY), np.float32)
    read_only.flags.writeable = False
    for tokens, logits, message in (
        (one[:0], out, "no tokens"),
        (one - 1, out, "outside the vocabulary"),
        (one + VOCABULARY, out, "outside the vocabulary"),
        (one.astype(np.int32), out, "dtype"),
        (one[None], out, "one row"),
        (np.zeros(4, np.int64)[::2], out, "contiguous"),
        (one, out[:, :-1].copy(), "shape"),
        (one, out[0], "shape"),
        (one, None, "no array"),
        (one, out.astype(np.float64), "dtype"),
        (one, np.empty((2, VOCABULARY), np.float32), "shape"),
        (one, read_only, "writeable"),
        (np.zeros(401, np.int64), out, "context length is 400"),
    ):
        with pytest.raises(GraphError, match=message):
            model.forward([(sequence, tokens, "last")], logits)
    with pytest.raises(GraphError, match="no sequences"):
        model.forward([], None)
    with pytest.raises(GraphError, match="kind of logits 'some'"):
        model.forward([(sequence, one, "some")], out)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        model.forward([(None, one, "last")], out)  # type: ignore[list-item]
    assert sequence.length == 0
    model.forward([(sequence, np.zeros(400, np.int64), "none")], None)
    with pytest.raises(GraphError, match="401 tokens, but the model's context length is 400"):
        model.forward([(sequence, one, "last")], out)
    for length in (-1, 401):
        with pytest.raises(GraphError, match="can't cut"):
            sequence.truncate(length)
        with pytest.raises(GraphError, match="can't fork"):
            sequence.fork(length)
    other = Engine(engine.graph)
    with pytest.raises(GraphError, match="another model"):
        other.model.forward([(sequence, one, "last")], out)


def test_use_after_close(engine: Engine) -> None:
    with engine:
        state = engine.state()
        generation = engine.stream([1, 2, 3], max_tokens=20)
        next(generation)
    for use in (
        lambda: engine.logits([1]),
        lambda: engine.generate([1]),
        lambda: list(engine.stream([1])),
        lambda: state.append(1),
        engine.info,
    ):
        with pytest.raises(GraphError, match="closed"):
            use()
    engine.close()  # twice is fine


def test_bad_settings(engine: Engine, tmp_path: Path) -> None:
    for how in ({"kernels": "sse9"}, {"cache": "f8"}):
        with pytest.raises(GraphError):
            Engine(engine.graph, **how)  # type: ignore[arg-type]
    for threads in (0, 10**6, 2**31, 1.5, True, "2"):
        with pytest.raises(GraphError, match="give a whole number from 1 to 1024"):
            Engine(engine.graph, threads)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="no type 'int3'; there are auto, f32, f16, int8"):
        Engine(engine.graph, cache="int3")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"no graph\.json"):
        Engine.load(tmp_path)


# --- threads and processes ---------------------------------------------------------------------


def test_engines_and_threads_do_not_disturb_each_other(engine: Engine) -> None:
    second = Engine(engine.graph, threads=3)
    expected = engine.logits(TOKENS)
    wrong: list[str] = []

    def use(which: Engine, name: str) -> None:
        for _ in range(5):
            if not np.array_equal(which.logits(TOKENS), expected):
                wrong.append(name)

    users = [
        threading.Thread(target=use, args=(which, name))
        for which, name in ((engine, "a"), (engine, "b"), (second, "c"), (second, "d"))
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity")
def test_pinned_workers_stay_on_their_cpus(engine: Engine) -> None:
    def tasks() -> set[int]:
        return {int(name) for name in os.listdir("/proc/self/task")}

    cpus = sorted(os.sched_getaffinity(0))
    before = tasks()
    pinned = Engine(engine.graph, len(cpus), pin=True)
    assert np.array_equal(pinned.logits(TOKENS), engine.logits(TOKENS))
    places = [os.sched_getaffinity(task) for task in tasks() - before]
    assert sorted(map(sorted, (p for p in places if len(p) == 1))) == [[cpu] for cpu in cpus[1:]]
    assert os.sched_getaffinity(0) == set(cpus)  # the caller's thread is the caller's
    with pytest.raises(GraphError, match="pin needs a CPU for each of"):
        Engine(engine.graph, len(cpus) + 1, pin=True)


FORK = """
import os, sys, numpy as np
from paring.engine import Engine
engine = Engine.load(sys.argv[1], threads=3)
tokens = list(range(40))
expected = engine.logits(tokens)
child = os.fork()
if child == 0:
    same = np.array_equal(engine.logits(tokens), expected)
    engine.close()
    os._exit(0 if same else 7)
assert np.array_equal(engine.logits(tokens), expected)
_, status = os.waitpid(child, 0)
engine.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(sys, "platform") or sys.platform == "win32", reason="no fork")
def test_an_engine_works_on_both_sides_of_a_fork(llama: Callable[..., Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(export(llama()))]
    assert subprocess.run(command, timeout=60).returncode == 0


def test_importing_the_engine_imports_no_torch() -> None:
    code = (
        "import sys, paring.engine\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), sorted(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
