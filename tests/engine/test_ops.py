"""Every op of the compiled engine against the plain interpreter, in double precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference_interpreter
from handmade import Builder

from paring.engine import Engine, _core
from paring.engine.graph import Activate, Add, Attention, Gate, Linear, Norm, Rope

EPSILON = float(np.finfo(np.float32).eps)
WIDTHS = (1, 15, 16, 17, 64, 100)


def compare(graph: Any, tokens: list[int], steps: float, **how: Any) -> None:
    """The engine's values are within `steps` float32 roundings of the largest exact one.

    They are also the same bits on every kernel row and thread count.
    """
    exact = reference_interpreter.logits(graph, tokens, **how)
    assert np.abs(exact).max() > 1e-3
    found = Engine(graph, threads=1, **how).logits(tokens)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert error <= steps * EPSILON
    for row in _core.rows():
        for threads in (1, 2, 3):
            again = Engine(graph, threads=threads, kernels=row, **how).logits(tokens)
            assert np.array_equal(again, found), (row, threads)


def tokens(builder: Builder, count: int = 9) -> list[int]:
    return builder.random.integers(0, builder.vocabulary, count).tolist()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("biased", [False, True])
def test_norm(kind: Any, biased: bool, width: int) -> None:
    if (kind, width, biased) == ("layer", 1, False):
        pytest.skip("the layer norm of one value is 0")
    b = Builder(width, vocabulary=max(width, 8))
    weight = b.vector("weight", 1 + b.normal(width))
    bias = b.vector("bias", b.normal(width)) if biased else None
    b.add(Norm(kind=kind, weight=weight, bias=bias, eps=1e-5, input="x", out="y"))
    compare(b.show("y", width), tokens(b), steps=16)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation_and_gate(kind: Any, width: int) -> None:
    b = Builder(width, vocabulary=max(width, 8))
    b.arrays["embedding/values"] *= 4  # into the flat parts of the curves
    b.add(
        Activate(kind=kind, input="x", out="a"),
        Gate(kind=kind, gate="x", up="a", out="g"),
        Add(a="g", b="x", out="y"),
    )
    compare(b.show("y", width), tokens(b), steps=16)


def test_curves_at_the_ends_of_the_range() -> None:
    b = Builder(8, vocabulary=8)
    extreme = [0.0, -0.0, 1e30, -1e30, 90.0, -90.0, 1e-30, -1e-30]
    b.arrays["embedding/values"][:] = np.array(extreme, np.float32)
    b.add(Activate(kind="silu", input="x", out="y"))
    found = Engine(b.show("y", 8), threads=1).logits([0])[0]
    assert found.tolist()[:4] == [0.0, 0.0, pytest.approx(1e30), 0.0]
    np.testing.assert_allclose(found[4:], [90.0, 0.0, 5e-31, -5e-31], rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("head_dim", "half"), [(4, 2), (20, 6), (64, 32), (40, 17)])
def test_rope(style: Any, head_dim: int, half: int) -> None:
    b = Builder(2 * head_dim, vocabulary=2 * head_dim)
    frequencies = b.vector("inv_freq", 10000.0 ** -(np.arange(half) / half))
    common = {"heads": 2, "head_dim": head_dim, "inv_freq": frequencies, "style": style}
    b.add(
        Rope(input="x", out="y", scale=1.0, **common),
        Rope(input="x", out="z", scale=1.25, **common),
        Add(a="y", b="z", out="sum"),
    )
    # An angle of up to 40 is itself rounded.
    compare(b.show("sum", 2 * head_dim), tokens(b, 40), steps=64)


ATTENTION = [(1, 1, 4), (4, 2, 16), (6, 2, 20), (3, 3, 64), (10, 2, 8), (2, 1, 80)]


def attention_graph(heads: int, kv_heads: int, head_dim: int, context: int) -> tuple[Any, Builder]:
    width = heads * head_dim
    b = Builder(width, vocabulary=width)
    for name, rows in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
        matrix = b.matrix(f"w{name}", b.normal(rows * head_dim, width) / np.float32(width**0.5))
        b.add(Linear(weight=matrix, input="x", out=name))
    b.add(
        Attention(
            q="q",
            k="k",
            v="v",
            out="y",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=1.7 * head_dim**-0.5,
            cache=0,
        )
    )
    b.caches = 1
    return b.show("y", width, context), b


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention(shape: tuple[int, int, int]) -> None:
    graph, b = attention_graph(*shape, context=90)
    compare(graph, tokens(b, 90), steps=64)


def int8_attention(
    heads: int, kv_heads: int, head_dim: int, context: int, calibrated: bool
) -> tuple[Any, Builder]:
    """Keys and values are the input's own, so that the interpreter rounds the very same floats."""
    graph, b = attention_graph(heads, kv_heads, head_dim, context)
    width = heads * head_dim
    for name, first in (("wk", 0), ("wv", width - kv_heads * head_dim)):
        graph.arrays[f"{name}/values"][:] = np.eye(kv_heads * head_dim, width, k=first)
    if calibrated:  # so narrow that some values are clamped
        for name, largest in (("k_scale", 2.0), ("v_scale", 1.5)):
            b.vector(name, np.linspace(largest, 1.0, kv_heads) / 127.5)
        place = next(i for i, op in enumerate(graph.ops) if isinstance(op, Attention))
        op = dataclasses.replace(graph.ops[place], k_scale="k_scale", v_scale="v_scale")
        graph = dataclasses.replace(
            graph,
            ops=(*graph.ops[:place], op, *graph.ops[place + 1 :]),
            tensors=dict(b.tensors),
            arrays={**graph.arrays, **{n: a for n, a in b.arrays.items() if "_scale" in n}},
        )
    return graph, b


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_over_an_int8_cache(shape: tuple[int, int, int], calibrated: bool) -> None:
    """Queries and weights are kept to 14 bits of their largest, twice what a byte of the cache has."""
    graph, b = int8_attention(*shape, context=90, calibrated=calibrated)
    compare(graph, tokens(b, 90), steps=2**11, cache="int8")


def test_int8_cache_rounds_like_numpy_on_every_row() -> None:
    """With one key, attention gives back its value as the cache keeps it."""
    values = np.zeros((5, 20), np.float32)
    values[0, :7] = [127.5, 0.5, 1.5, -0.5, -1.5, 126.5, -127.5]  # steps of 1: ties go to even
    values[1, :3] = [3e38, -3e38, 1e30]
    values[2, :2] = [1e-45, 2e-45]  # the scale is 0
    values[4] = np.random.default_rng(3).standard_normal(20)
    for calibrated in (False, True):
        graph, _ = int8_attention(1, 1, 20, context=4, calibrated=calibrated)
        graph.arrays["wq/values"][:] = 0  # the scores of the great ones would overflow
        graph.arrays["embedding/values"][:5] = values
        for token in range(5):
            expected = reference_interpreter.logits(graph, [token], "int8")[0]
            for row in _core.rows():
                with Engine(graph, threads=1, kernels=row, cache="int8") as engine:
                    found = engine.logits([token])[0]
                np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=row)


def test_int8_cache_shows_what_is_not_finite() -> None:
    """A product that overflows is NaN in the result, as with floats, and no integer is undefined."""
    for calibrated in (False, True):
        graph, _ = int8_attention(2, 1, 20, context=8, calibrated=calibrated)
        graph.arrays["embedding/values"][3, 5] = 3e38
        graph.arrays["wv/values"][:, 5] = 2  # 6e38 is infinite
        for row in _core.rows():
            with Engine(graph, threads=1, kernels=row, cache="int8") as engine:
                found = engine.logits(
                    [1, 2, 1, 3, 1]
                )  # the third and the fourth share a tile of rows
            assert np.isfinite(found[:3]).all(), row
            assert np.isnan(found[3:, :40]).all(), row


@pytest.mark.parametrize("cache", ["f32", "f16", "int8"])
def test_attention_over_many_pages_is_the_same_token_by_token(cache: Any) -> None:
    """700 tokens cross pages, chunks of keys, and chunks of the prompt."""
    graph, b = attention_graph(4, 2, 16, context=700)
    ids = tokens(b, 700)
    exact = reference_interpreter.logits(graph, ids)
    for threads in (1, 3):
        engine = Engine(graph, threads=threads, cache=cache)
        whole = engine.logits(ids)
        tolerance = {"f32": 64 * EPSILON, "f16": 2.0**-10, "int8": 2.0**-6}[cache]
        assert np.abs(whole - exact).max() <= tolerance * np.abs(exact).max()
        state = engine.state()
        for place, token in enumerate(ids):
            state.append(token)
            assert np.array_equal(state.logits, whole[place]), place


def test_f16_cache_rounds_like_numpy_on_every_row() -> None:
    """With one key, attention gives back its value as the cache keeps it."""
    graph, b = attention_graph(1, 1, 16, context=4)
    graph.arrays["wv/values"][:] = np.eye(16)
    graph.arrays["wk/values"][:] = 0
    special = [0, -0.0, 1, 65504, 65519, -65519, 6e-8, 5.9e-8, 2.98e-8, 3e-8, 6.1e-5, 6.09e-5]
    values = np.concatenate([np.array(special, np.float32), b.normal(4)])
    graph.arrays["embedding/values"][0] = values
    for row in _core.rows():
        found = Engine(graph, threads=1, kernels=row, cache="f16").logits([0])[0]
        assert np.array_equal(found, values.astype(np.float16).astype(np.float32)), row


@pytest.mark.parametrize("biased", [False, True])
def test_linears_that_share_an_input(biased: bool) -> None:
    """Float, dynamic, static and weight-only matrices of one value, in one fork-join."""
    from paring.engine.graph import Activation

    b = Builder(48, vocabulary=50)
    static = Activation(bits=8, dynamic=False)
    names = [
        b.matrix("float", b.normal(50, 48) / 8),
        b.integers("dynamic", 50, 48),
        b.integers("sparse", 50, 48, sparsity=0.7),
        b.integers("static", 50, 48, activation=static, static=(0.04, 3)),
        b.integers("other", 50, 48, activation=static, static=(0.03, -5)),
    ]
    total = None
    for name in names:
        bias = b.vector(f"{name}.bias", b.normal(50)) if biased else None
        b.add(Linear(weight=name, bias=bias, input="x", out=f"{name}.y"))
    for name in names:
        if total is None:
            total = f"{name}.y"
            continue
        b.add(Add(a=total, b=f"{name}.y", out=f"{name}.sum"))
        total = f"{name}.sum"
    assert total is not None
    compare(b.show(total, 50), tokens(b, 20), steps=64)


@pytest.mark.parametrize("kind", ["f16", "i8", "i8-group", "f32-bitmask"])
def test_stored_embeddings(kind: str) -> None:
    b = Builder(40, vocabulary=40)
    values = b.normal(40, 40)
    keep = b.random.random((40, 40)) < 0.4
    if kind == "f16":
        b.matrix("embedding", values.astype(np.float16))
    elif kind == "f32-bitmask":
        b.matrix("embedding", values * keep, keep=keep)
    else:
        b.integers("embedding", 40, 40, group=32 if kind == "i8-group" else 0)
    expected = reference_interpreter.weights(b.show("x", 40), "embedding")
    found = Engine(b.show("x", 40), threads=1).logits(list(range(40)))
    assert np.array_equal(found, expected.astype(np.float32))
