"""What the compiled core does with graphs that nobody has checked before: an error or logits, never a crash."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from handmade import Builder

from paring.engine import Engine, _core
from paring.engine.graph import Activation, Add, Attention, Graph, Linear, Norm, Rope, Vector
from paring.errors import GraphError

WIDTH, VOCABULARY = 32, 40


def model() -> Graph:
    """Norm, q/k/v, rope, attention, residual: one op of most kinds, with every way to store a matrix."""
    b = Builder(WIDTH, VOCABULARY)
    b.integers("wq", WIDTH, WIDTH, sparsity=0.5)
    b.integers("wk", 16, WIDTH)
    static = Activation(bits=8, dynamic=False)
    b.integers("wv", 16, WIDTH, activation=static, static=(0.05, 4))
    b.matrix("head", b.normal(VOCABULARY, WIDTH))
    frequencies = b.vector("inv_freq", 0.1 ** np.arange(4))
    rope: dict[str, Any] = {
        "head_dim": 8,
        "inv_freq": frequencies,
        "style": "half",
        "scale": 1.0,
    }
    b.add(
        Norm(kind="rms", weight=b.vector("norm", b.normal(WIDTH)), eps=1e-5, input="x", out="n"),
        Linear(weight="wq", input="n", out="q", bias=b.vector("bias", b.normal(WIDTH))),
        Linear(weight="wk", input="n", out="k"),
        Linear(weight="wv", input="n", out="v"),
        Rope(input="q", out="qr", heads=4, **rope),
        Rope(input="k", out="kr", heads=2, **rope),
        Attention(
            q="qr", k="kr", v="v", out="a", heads=4, kv_heads=2, head_dim=8, scale=0.3, cache=0
        ),
        Add(a="x", b="a", out="y"),
    )
    b.caches = 1
    b.vector("two", np.array([0.1, 0.2]))  # scales of a cache, for the tests that name them
    b.vector("zero", np.array([0.1, 0.0]))
    return b.graph("y", head="head")


def run(graph: Graph) -> np.ndarray:
    return Engine(graph, threads=2).logits(list(range(VOCABULARY)))


def change(graph: Graph, op: int, **fields: Any) -> Graph:
    ops = list(graph.ops)
    ops[op] = dataclasses.replace(ops[op], **fields)
    return dataclasses.replace(graph, ops=tuple(ops))


def test_the_model_runs() -> None:
    assert np.isfinite(run(model())).all()


OPS = [
    (0, {"weight": "nothing"}, "no matrix 'nothing'"),
    (0, {"weight": "norm"}, "no matrix 'norm'"),
    (1, {"input": "later"}, "before any op has written it"),
    (1, {"input": "q"}, "before any op has written it"),
    (1, {"out": "x"}, "second time"),
    (1, {"out": ""}, "no output"),
    (1, {"weight": "inv_freq"}, "has 4 values, expected 32"),
    (1, {"weight": "wq"}, "no vector"),
    (1, {"eps": float("nan")}, "eps"),
    (1, {"eps": -1.0}, "eps"),
    (1, {"eps": "0"}, "must be a number"),
    (1, {"kind": "batch"}, "one of rms, layer"),
    (2, {"bias": "inv_freq"}, "expected 32"),
    (2, {"bias": ""}, "must not be empty"),
    (3, {"input": 7}, "must be a string"),
    (5, {"heads": 5}, "expected 40"),
    (5, {"heads": 0}, "heads is 0"),
    (5, {"heads": 2**70}, "out of range"),
    (5, {"heads": True}, "must be an integer"),
    (5, {"heads": 4.0}, "must be an integer"),
    (5, {"inv_freq": "norm"}, "half of head_dim"),
    (5, {"scale": float("inf")}, "finite"),
    (5, {"style": "both"}, "one of half, interleaved"),
    (7, {"kv_heads": 3}, "multiple"),
    (7, {"kv_heads": 0}, "kv_heads"),
    (7, {"kv_heads": 8}, "kv_heads"),
    (7, {"head_dim": 16}, "expected 64"),
    (7, {"head_dim": -8}, "head_dim"),
    (7, {"k": "q"}, "expected 16"),
    (7, {"cache": 1}, "cache 1"),
    (7, {"cache": -1}, "cache -1"),
    (7, {"scale": 1e300}, "finite"),
    (7, {"k_scale": "norm"}, "go together"),
    (7, {"v_scale": "norm"}, "go together"),
    (7, {"k_scale": "norm", "v_scale": "norm"}, "expected 2"),
    (7, {"k_scale": "two", "v_scale": "nothing"}, "no vector 'nothing'"),
    (7, {"k_scale": "two", "v_scale": "zero"}, "not positive"),
    (7, {"k_scale": "two", "v_scale": ""}, "must not be empty"),
    (8, {"b": "k"}, "expected 32"),
    (9, {"input": "k"}, "expected 32"),
    (9, {"weight": "wq"}, "expected 40"),
]


@pytest.mark.parametrize(("op", "fields", "message"), OPS, ids=lambda value: str(value)[:40])
def test_a_broken_op_is_named(op: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        run(change(model(), op, **fields))


def test_broken_programs() -> None:
    graph = model()
    attention = graph.ops[7]
    for ops, message in (
        ((), "no head"),
        (graph.ops[:-1], "no head"),
        ((*graph.ops, graph.ops[-1]), "last op"),
        ((*graph.ops[:-1], dataclasses.replace(attention, out="b"), graph.ops[-1]), "second time"),
        ((*graph.ops[:7], dataclasses.replace(graph.ops[8], b="x"), graph.ops[9]), "no attention"),
    ):
        with pytest.raises(GraphError, match=message):
            run(dataclasses.replace(graph, ops=ops))
    for field, value in (
        ("vocab_size", 39),
        ("vocab_size", -1),
        ("context", 0),
        ("context", 2**40),
        ("caches", 2),
        ("caches", -1),
        ("hidden_size", 0),
    ):
        broken = dataclasses.replace(graph.model, **{field: value})
        with pytest.raises(GraphError):
            run(dataclasses.replace(graph, model=broken))


ARRAYS: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
    ("embedding/values", lambda a: a * np.float32(np.nan), "not finite"),
    ("embedding/values", lambda a: a[:-1], "values"),
    ("embedding/values", lambda a: a.astype(np.float64), "dtype"),
    ("embedding/values", lambda a: np.asfortranarray(a), "contiguous"),
    ("head/values", lambda a: a + np.float32(np.inf), "not finite"),
    ("norm/values", lambda a: a * np.float32(np.nan), "not finite"),
    ("norm/values", lambda a: a[:, None], "one dimension"),
    ("norm/values", lambda a: a[:-1], "expected 32"),
    ("bias/values", lambda a: a.astype(np.float16), "dtype"),
    ("wq/values", lambda a: a[:-1], "values"),
    ("wq/values", lambda a: np.append(a, a[:1]), "values"),
    ("wq/mask", lambda a: a ^ 1, "values|nonzeros"),
    ("wq/mask", lambda a: a[:, :-1].copy(), "mask"),
    ("wq/mask", lambda a: a.astype(np.int8), "dtype"),
    ("wq/scales", lambda a: a * np.float32(np.nan), "not finite"),
    ("wq/scales", lambda a: a[:-1], "scales"),
    ("wk/values", lambda a: a.view(np.uint8), "dtype"),
    ("wv/input_scale", lambda a: a * 0, "input scale"),
    ("wv/input_scale", lambda a: -a, "input scale"),
    ("wv/input_zero_point", lambda a: a + 128, "zero point"),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"), ARRAYS, ids=[f"{a[0]}-{i}" for i, a in enumerate(ARRAYS)]
)
def test_broken_data_is_named(
    name: str, damage: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    graph = model()
    arrays = {**graph.arrays, name: damage(graph.arrays[name])}
    with pytest.raises(GraphError, match=message) as caught:
        run(dataclasses.replace(graph, arrays=arrays))
    assert name.split("/")[0] in str(caught.value)


def test_declared_counts_are_not_believed() -> None:
    graph = model()
    for change in ({"nonzeros": 1}, {"shape": (32, 33)}, {"shape": (2**30, 32)}, {"group": 7}):
        tensors = dict(graph.tensors)
        tensors["wq"] = dataclasses.replace(tensors["wq"], **change)  # type: ignore[arg-type]
        with pytest.raises(GraphError, match="wq"):
            run(dataclasses.replace(graph, tensors=tensors))
    tensors = dict(graph.tensors)
    tensors["embedding"] = dataclasses.replace(tensors["embedding"], shape=(40, 0))  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="embedding.*at least 1 x 1"):
        run(dataclasses.replace(graph, tensors=tensors))


def test_a_loader_takes_each_name_once_and_finishes_once() -> None:
    loader = _core.Loader("auto")
    loader.vector("v", np.zeros(3, np.float32))
    with pytest.raises(GraphError, match="second time"):
        loader.vector("v", np.zeros(3, np.float32))
    with pytest.raises(GraphError, match="must be a dictionary"):
        loader.finish(
            ops=["embedding"],  # type: ignore[list-item]
            vocabulary=8,
            hidden=8,
            context=8,
            caches=0,
            kv="f32",
            threads=1,
            pin=False,
        )


def mutate(graph: Graph, chance: random.Random) -> Graph:
    """One thing of the graph put to a value of the right type that need not make sense."""
    names = [*graph.tensors, *(op.out for op in graph.ops), "", "nothing"]
    numbers = [-(2**40), -1, 0, 1, 2, 3, 7, 8, 16, 33, 512, 513, 2**24, 2**31, 2**40]
    where = chance.randrange(4)
    if where == 0:
        index = chance.randrange(len(graph.ops))
        op = graph.ops[index]
        field = chance.choice([f for f in dataclasses.fields(op) if f.name != "op"])
        old = getattr(op, field.name)
        new: Any = chance.choice(names)
        if isinstance(old, int):
            new = chance.choice(numbers)
        elif isinstance(old, float):
            new = chance.choice([0.0, -1.0, 1e30, 1e-30, float("nan"), float("inf")])
        return change(graph, index, **{field.name: new})
    if where == 1:
        ops = list(graph.ops)
        first, second = chance.randrange(len(ops)), chance.randrange(len(ops))
        ops[first], ops[second] = ops[second], ops[first]
        if chance.random() < 0.5:
            del ops[first]
        return dataclasses.replace(graph, ops=tuple(ops))
    if where == 2:
        name = chance.choice(list(graph.tensors))
        tensor = copy.copy(graph.tensors[name])
        if isinstance(tensor, Vector):
            return graph
        shape = (chance.choice(numbers), tensor.shape[1])
        tensor = dataclasses.replace(tensor, shape=chance.choice([shape, shape[::-1]]))
        return dataclasses.replace(graph, tensors={**graph.tensors, name: tensor})
    name = chance.choice(list(graph.arrays))
    array = graph.arrays[name].copy()
    raw = array.reshape(-1).view(np.uint8)
    for _ in range(chance.choice([1, 8])):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        array = array[: chance.randrange(len(array))]
    return dataclasses.replace(graph, arrays={**graph.arrays, name: array})


def test_random_damage_gives_an_error_or_logits() -> None:
    refused = 0
    for seed in range(300):
        chance = random.Random(seed)
        graph = model()
        for _ in range(chance.choice([1, 1, 3])):
            graph = mutate(graph, chance)
        try:
            logits = run(graph)
        except GraphError:
            refused += 1
            continue
        assert logits.shape == (VOCABULARY, graph.model.vocab_size)
    assert 50 < refused < 290  # else the damage is too mild, or too coarse, to show anything


def test_what_measures_refuses_counts_that_are_none() -> None:
    for threads, passes in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            _core.kernels.time_reading(4096, threads, passes)
