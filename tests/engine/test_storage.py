from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_interpreter import stored_values, weights
from safetensors.numpy import load_file

from paring.engine import storage
from paring.engine.graph import Activation, Embedding, Graph, Head, Matrix, Model
from paring.engine.graph_file import read_graph
from paring.engine.graph_writer import GraphWriter
from paring.errors import GraphError

VOCABULARY = 21
DTYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "i4": np.int8}


def random_matrix(
    dtype: str, n: int, k: int, density: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, k] over the dtype's whole range, 0 where the mask drops them; a few kept ones are 0 as well."""
    generator = np.random.default_rng(seed)
    low, high = (-8, 8) if dtype == "i4" else (-128, 128)
    mask = generator.random((n, k)) < density
    values = generator.integers(low, high, (n, k)).astype(DTYPES[dtype])
    return np.where(mask, values, np.zeros((), values.dtype)), mask


def write(folder: Path, values: np.ndarray, **how: Any) -> Graph:
    """A graph with an embedding and `values` [VOCABULARY, k] as its head."""
    k = values.shape[1]
    with GraphWriter(folder) as writer:
        writer.matrix("embedding", np.ones((VOCABULARY, k), np.float32))
        writer.matrix("head", values, **how)
        writer.finish(
            Model(architecture="test", vocab_size=VOCABULARY, hidden_size=k, context=8, caches=0),
            [Embedding(weight="embedding", out="x"), Head(weight="head", input="x", out="y")],
        )
    return read_graph(folder)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_storage_comes_back(
    tmp_path: Path, dtype: str, density: float, k: int
) -> None:
    values, mask = random_matrix(dtype, VOCABULARY, k, density)
    integers: dict[str, Any] = {}
    if dtype in ("i8", "i4"):
        scales = np.random.default_rng(1).random((VOCABULARY, 1)).astype(np.float32)
        integers = {"scales": scales, "bits": int(dtype[1]), "activation": Activation(bits=16)}
    for dense in (False, True):
        graph = write(tmp_path / f"{dense}", values, mask=mask, dense=dense, **integers)
        matrix, parts = graph.tensors["head"], graph.parts("head")
        assert isinstance(matrix, Matrix)
        assert matrix.dtype == dtype
        assert matrix.nonzeros == mask.sum()
        np.testing.assert_array_equal(storage.unpack(matrix, parts), values)
        np.testing.assert_array_equal(stored_values(graph, "head"), values)
        if matrix.storage == "bitmask":
            np.testing.assert_array_equal(storage.unpack_mask(parts["mask"], k), mask)
        if dense:
            assert matrix.storage == "dense"


def test_the_smaller_storage_is_chosen(tmp_path: Path) -> None:
    """Of 21 x 64: the mask costs 1 bit a weight, so int8 gains below 7/8 and int4 below 3/4 density."""
    for dtype, density, expected in (
        ("f32", 0.9, "bitmask"),
        ("f32", 1.0, "dense"),
        ("i8", 0.8, "bitmask"),
        ("i8", 0.95, "dense"),
        ("i4", 0.65, "bitmask"),
        ("i4", 0.85, "dense"),
    ):
        values, mask = random_matrix(dtype, VOCABULARY, 64, density)
        sizes = {}
        for kind in ("dense", "bitmask"):
            parts = storage.pack(dtype, kind, values, mask)
            sizes[kind] = sum(part.nbytes for part in parts.values())
        assert min(sizes, key=lambda kind: sizes[kind]) == expected, (dtype, density)
        assert storage.bitmask_is_smaller(dtype, mask) == (expected == "bitmask")


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_round_trips_and_fits_the_predicted_size(
    n: int, k: int, density: float, seed: int
) -> None:
    values, mask = random_matrix("i4", n, k, density, seed)
    np.testing.assert_array_equal(storage.unpack_int4(storage.pack_int4(values), k), values)
    packed = storage.pack_mask(mask)
    np.testing.assert_array_equal(storage.unpack_mask(packed, k), mask)
    np.testing.assert_array_equal(storage.row_counts(packed), mask.sum(axis=1))
    assert storage.padding_is_zero(packed, k)
    kept = storage.pack_kept_int4(values, mask)
    assert len(kept) == storage.kept_int4_bytes(mask.sum(axis=1))
    np.testing.assert_array_equal(storage.unpack_kept_int4(kept, mask), values)


def test_bits_and_nibbles_lie_as_documented() -> None:
    mask = np.zeros((1, 11), np.bool_)
    mask[0, [0, 3, 9]] = True
    assert storage.pack_mask(mask).tolist() == [[0b1001, 0b10]]
    assert storage.pack_int4(np.array([[1, -1, -8]], np.int8)).tolist() == [[0xF1, 0x08]]
    rows = np.array([[1, 2, 3], [0, 0, 4], [5, 0, 6]], np.int8)
    assert storage.pack_kept_int4(rows, rows != 0).tolist() == [0x21, 0x03, 0x04, 0x65]


def test_padding_bits_are_seen() -> None:
    packed = np.array([[255, 0b111]], np.uint8)
    assert storage.padding_is_zero(packed, 11)
    assert not storage.padding_is_zero(packed, 10)


@pytest.mark.parametrize("group", [0, 8, 5])
@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_dequantized_weights_use_the_scale_of_their_group(
    tmp_path: Path, dtype: str, group: int
) -> None:
    values, mask = random_matrix(dtype, VOCABULARY, 17, 0.4)
    groups = -(-17 // group) if group else 1
    scales = np.random.default_rng(1).normal(size=(VOCABULARY, groups)).astype(np.float32)
    bits: Any = int(dtype[1])
    activation = Activation(bits=16)
    how: dict[str, Any] = {"bits": bits, "group": group, "activation": activation}
    graph = write(tmp_path / "graph", values, mask=mask, scales=scales, **how)
    matrix = graph.tensors["head"]
    assert isinstance(matrix, Matrix)
    found = storage.dequantize(matrix, graph.parts("head"))
    np.testing.assert_allclose(found, weights(graph, "head"), rtol=1e-6)


def test_other_readers_understand_the_file(tmp_path: Path) -> None:
    """Odd sizes first, so that only the order by element size keeps floats aligned."""
    values, mask = random_matrix("i8", VOCABULARY, 7, 0.3)
    scales = np.ones((VOCABULARY, 1), np.float32)
    graph = write(tmp_path / "g", values, mask=mask, scales=scales, activation=Activation(bits=16))
    arrays = load_file(tmp_path / "g" / "graph.safetensors")
    assert arrays.keys() == graph.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, graph.arrays[name])
        assert graph.arrays[name].flags.aligned
        assert not graph.arrays[name].flags.writeable


@pytest.mark.parametrize(
    "how",
    [
        {"mask": np.zeros((VOCABULARY, 4), np.bool_)},
        {"values": np.full((VOCABULARY, 4), 8, np.int8), "bits": 4},
        {"scales": np.ones((VOCABULARY, 2))},
        {"scales": None},
        {"scales": np.full((VOCABULARY, 1), np.inf)},
        {"activation": None},
        {"group": 9, "scales": np.ones((VOCABULARY, 1))},
        {"activation": Activation(bits=8, dynamic=False), "input_scale": 0.0},
        {
            "activation": Activation(bits=8, dynamic=False),
            "input_scale": 1,
            "input_zero_point": 200,
        },
    ],
    ids=str,
)
def test_the_writer_refuses_what_the_reader_would(tmp_path: Path, how: dict[str, Any]) -> None:
    right = {
        "values": np.ones((VOCABULARY, 4), np.int8),
        "scales": np.ones((VOCABULARY, 1)),
        "activation": Activation(bits=16),
    }
    write(tmp_path / "graph", **right)
    with pytest.raises(GraphError):
        write(tmp_path / "bad", **{**right, **how})
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
