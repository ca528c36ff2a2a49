"""Every kernel row against numpy and, bit for bit, against the reference row."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from paring.engine import _core

kernels: Any = _core.kernels

SIZES = (1, 15, 16, 17, 63, 64, 65, 576, 1536, 4096)
# Every size as n and as k, without the cost of every pair.
SHAPES = [(n, 40) for n in SIZES] + [(17, k) for k in SIZES] + [(576, 576)]
PATTERNS = ("zero", "dense", "lowest", "0.1", "0.5", "0.95", "blocks")
# Window patterns keep N of every M columns; "<=" up to N; "lowest" with the lowest weights there are.
WINDOWS = {
    "2of4": ("zero", "2:4", "<=2:4", "lowest 2:4"),
    "4of16": ("zero", "4:16", "<=4:16", "lowest 4:16"),
    "pairs": (*PATTERNS, "pairs"),
    "columns": (*PATTERNS, "columns"),
    "lists": (*PATTERNS, "8:16", "<=8:16", "n:16", "lowest 8:16", "0.99"),
    "lists4": (*PATTERNS, "4:16", "<=4:16", "0.99", "0.999"),
    "n16": (*PATTERNS, "4:16", "8:16", "12:16", "<=8:16", "n:16", "lowest 8:16"),
}
ROWS = [name for name, supported in kernels.rows() if supported]
FAST = [name for name in ROWS if name != "reference"]
# Layout, then the (mode, group) pairs it is driven with.
INTEGER_LAYOUTS = (
    "i8_dense",
    "i8_bitmask",
    "i8_block4",
    "i4_dense",
    "i4_bitmask",
    "i4_block4",
    "i8_2of4",
    "i4_2of4",
    "i8_4of16",
    "i4_4of16",
    "i8_n16",
    "i4_n16",
    "i8_pairs",
    "i4_pairs",
    "i8_columns",
    "i4_columns",
    "i4_words",
    "i8_lists",
    "i4_lists",
    "i8_lists4",
    "i4_lists4",
)
# Not every row runs every layout: those that it would never choose.
RUN = [(row, layout) for row in ROWS for layout in kernels.layouts(row)]
RUN_INTEGERS = [(row, layout) for row, layout in RUN if layout in INTEGER_LAYOUTS]
MODES = (
    ("int8_dynamic", 0),
    ("int8_dynamic", 64),
    ("int8_static", 0),
    ("int8_static", 32),
    ("int16", 0),
    ("int16", 32),
    ("int16", 128),
)


def seeded(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def pruned(pattern: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Which weights [n, k] a pattern keeps."""
    if pattern in ("dense", "lowest"):
        return np.ones((n, k), bool)
    if ":" in pattern:
        return pruned_windows(pattern.split()[-1], n, k, rng)
    if pattern in ("pairs", "columns"):  # 2 or 16 rows keep the same, 40 %
        rows = 2 if pattern == "pairs" else 16
        return np.repeat(rng.random((-(-n // rows), k)) >= 0.6, rows, axis=0)[:n]
    if pattern == "blocks":
        return np.repeat(rng.random((n, -(-k // 4))) >= 0.7, 4, axis=1)[:, :k]
    return rng.random((n, k)) >= (1.0 if pattern == "zero" else float(pattern))


def pruned_windows(pattern: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """N of every M consecutive columns; "<=": up to N; "n:16": n in 0, 4 .. 16 per 16 x 16 tile."""
    keep, width = pattern.removeprefix("<=").split(":")
    windows = -(-k // int(width))
    order = rng.random((n, windows, int(width))).argsort(axis=2)
    if keep == "n":
        tiles = rng.choice([0, 4, 8, 12, 16], (-(-n // 16), windows))
        count = np.repeat(tiles, 16, axis=0)[:n, :, None]
    elif pattern.startswith("<="):
        count = rng.integers(0, int(keep) + 1, (n, windows, 1))
    else:
        count = np.full((n, windows, 1), int(keep))
    kept: np.ndarray = (order < count).reshape(n, -1)[:, :k]
    return kept


def patterns(layout: str) -> tuple[str, ...]:
    """The patterns a layout can hold."""
    return WINDOWS.get(layout.split("_")[1], PATTERNS)


def half_kept(layout: str) -> str:
    """A pattern that keeps about half of the weights, or what the layout can hold."""
    fitting = {"2of4": "2:4", "4of16": "4:16", "n16": "8:16"}
    return fitting.get(layout.split("_")[1], "0.5")


def integers(pattern: str, bits: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights int8 [n, k] and what is kept of them; a kept weight may be 0."""
    rng = seeded(pattern, bits, n, k)
    low = -(2 ** (bits - 1))
    weights = rng.integers(low, -low, (n, k)).astype(np.int8)
    if pattern.startswith("lowest"):
        weights[:] = low
    kept = pruned(pattern, n, k, rng)
    return np.where(kept, weights, 0).astype(np.int8), kept


def row_values(row: np.ndarray, bits: int) -> bytes:
    if bits == 8:
        return row.tobytes()
    padded = np.append(row, np.zeros(len(row) % 2, np.int8)).astype(np.uint8) & 15
    return (padded[0::2] | padded[1::2] << 4).tobytes()


def pack_integers(
    weights: np.ndarray,
    kept: np.ndarray,
    layout: str,
    scales: np.ndarray,
    choose: bool = False,
    **settings: Any,
) -> Any:
    bits, bitmask = int(layout[1]), not layout.endswith("dense")
    rows = [w[m] if bitmask else w for w, m in zip(weights, kept, strict=True)]
    values = np.frombuffer(b"".join(row_values(row, bits) for row in rows), np.uint8)
    mask = np.packbits(kept, axis=1, bitorder="little") if bitmask else None
    n, k = weights.shape
    name = None if choose else layout
    return kernels.pack(n, k, f"i{bits}", values, mask, scales, layout=name, **settings)


def pack_floats(weights: np.ndarray, kept: np.ndarray, layout: str) -> Any:
    bitmask = layout.endswith("bitmask")
    values = (weights[kept] if bitmask else weights).ravel().view(np.uint8)
    mask = np.packbits(kept, axis=1, bitorder="little") if bitmask else None
    n, k = weights.shape
    return kernels.pack(n, k, layout[:3], values, mask, layout=layout)


def kinds(group: int) -> tuple[bool, ...]:
    """Whether scales are exact in float16: both, where that changes how they are packed."""
    return (False, True) if group else (False,)


def integer_case(
    layout: str, pattern: str, shape: tuple[int, int], mode: str, group: int, half: bool = False
) -> Any:
    """A packed matrix with random scales, its weights, and those scales spread over [n, k].

    half: the scales are exact in float16.
    """
    n, k = shape
    weights, kept = integers(pattern, int(layout[1]), n, k)
    groups = -(-k // group) if group else 1
    scales = seeded("scales", shape).uniform(0.001, 0.01, (n, groups))
    scales = scales.astype(np.float16 if half else np.float32).astype(np.float32)
    static = {"input_scale": 0.03, "zero_point": -7} if mode == "int8_static" else {}
    packed = pack_integers(weights, kept, layout, scales, group=group, mode=mode, **static)
    return packed, weights, np.repeat(scales, group or k, axis=1)[:, :k]


def float_case(layout: str, sparsity: str, shape: tuple[int, int]) -> tuple[Any, np.ndarray]:
    rng = seeded(layout, shape)
    kept = pruned(sparsity if layout.endswith("bitmask") else "dense", *shape, rng)
    kind = np.float16 if layout.startswith("f16") else np.float32
    weights = (rng.standard_normal(shape) * kept).astype(kind)
    return pack_floats(weights, kept, layout), weights


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def test_the_rows_this_cpu_has_are_the_rows_it_says() -> None:
    assert next(name for name, _ in kernels.rows()) == "reference"
    assert dict(kernels.rows())["reference"]
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith(("flags", "Features"))).split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2"},
        "avx512_vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2"},
        "avx512_vbmi2": {"avx512_vnni", "avx512vbmi", "avx512_vbmi2"},
    }
    for name, supported in kernels.rows():
        if name in needs:
            assert supported == (needs[name] <= flags), name


def test_an_unknown_row_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="reference"):
        kernels.layouts("sse9")


@pytest.mark.parametrize(
    ("layout", "pattern"), [(lay, p) for lay in INTEGER_LAYOUTS for p in patterns(lay)]
)
def test_packing_keeps_every_integer(layout: str, pattern: str) -> None:
    for n, k in SHAPES:
        packed, weights, _ = integer_case(layout, pattern, (n, k), "int8_dynamic", 0)
        assert packed.layout == layout
        assert np.array_equal(packed.unpack(), weights)
        if not layout.endswith("dense"):
            assert packed.nonzeros == integers(pattern, int(layout[1]), n, k)[1].sum()


@pytest.mark.parametrize("layout", ["f32_dense", "f32_bitmask", "f16_dense"])
def test_packing_keeps_every_float(layout: str) -> None:
    for shape in SHAPES:
        packed, weights = float_case(layout, "0.5", shape)
        assert np.array_equal(packed.unpack(), weights.astype(np.float32))


def test_every_half_becomes_the_right_float() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)][:, None]
    packed = pack_floats(halves, np.ones(halves.shape, bool), "f16_dense")
    for row in ROWS:
        out = kernels.linear(row, packed, np.ones((1, 1), np.float32))
        assert np.array_equal(out[0], halves[:, 0].astype(np.float32)), row


@pytest.mark.parametrize(("row", "layout"), RUN_INTEGERS)
def test_integer_sums_are_exact(row: str, layout: str) -> None:
    for (n, k), pattern in [(s, p) for s in SHAPES if s[1] <= 576 for p in patterns(layout)]:
        weights, kept = integers(pattern, int(layout[1]), n, k)
        ones = np.ones((n, 1), np.float32)
        packed = pack_integers(
            weights, kept, layout, ones, mode="int8_static", input_scale=1.0, zero_point=3
        )
        x = seeded(n, k).integers(-131, 125, (3, k)).astype(np.float32)
        x[2] = -131  # quantizes to -128: with all weights -128, the largest sums there are
        expected = x.astype(np.int64) @ weights.T.astype(np.int64)
        assert np.abs(expected).max() < 2**24  # so that float32 holds every sum
        assert np.array_equal(kernels.linear(row, packed, x), expected), (n, k, pattern)


@pytest.mark.parametrize(("mode", "group"), MODES)
@pytest.mark.parametrize(("row", "layout"), [one for one in RUN_INTEGERS if one[0] in FAST])
def test_integer_rows_agree_with_reference(row: str, layout: str, mode: str, group: int) -> None:
    for index, shape in enumerate(SHAPES):
        fitting = patterns(layout)
        cases = [(fitting[index % len(fitting)], False)]
        cases += [(half_kept(layout), half) for half in kinds(group)]
        for pattern, half in cases:
            packed, _, _ = integer_case(layout, pattern, shape, mode, group, half)
            x = seeded(shape).standard_normal((3, shape[1])).astype(np.float32)
            reference = kernels.linear("reference", packed, x)
            assert same_bits(kernels.linear(row, packed, x), reference), (shape, pattern, half)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("layout", INTEGER_LAYOUTS)
def test_scales_are_kept_in_float16_where_that_loses_nothing(layout: str, group: int) -> None:
    """One that is not exact makes them all float32: more bytes, and the same outputs of all other rows."""
    n, k = 40, 300
    weights, kept = integers(half_kept(layout), int(layout[1]), n, k)
    groups = -(-k // group)
    scales = seeded(group).uniform(0.001, 0.01, (n, groups)).astype(np.float16).astype(np.float32)
    scales[:6, -1] = 2.0**-24, 3 * 2.0**-20, 2.0**-14, 65504, -0.0, -1 - 2.0**-10
    settings = {"group": group, "mode": "int8_static", "input_scale": 0.03, "zero_point": -7}
    halves = pack_integers(weights, kept, layout, scales, **settings)
    x = seeded(3).standard_normal((3, k)).astype(np.float32)
    for inexact in (2.0**-25, 1.5 * 2.0**-24, 2.0**-14 + 2.0**-25, 1 + 2.0**-11, 65536, 1e38):
        scales[-1, -1] = inexact
        floats = pack_integers(weights, kept, layout, scales, **settings)
        header = 64 * -(-groups // 2)  # 2 groups a line, and of float32 1
        assert floats.bytes - halves.bytes == floats.panels * (64 * groups - header), inexact
        assert np.array_equal(floats.unpack(), halves.unpack())
    for row in (row for row in ROWS if layout in kernels.layouts(row)):
        for m in (1, 3):
            found, expected = (kernels.linear(row, w, x[:m])[:, :-1] for w in (halves, floats))
            assert same_bits(found.copy(), expected.copy()), row


def test_one_scale_a_row_is_kept_in_float32() -> None:
    """Of a single group half of it would save nothing."""
    weights, kept = integers("dense", 4, 16, 64)
    for group in (0, 64):
        for scale in (0.5, 0.1):
            scales = np.full((16, 1), scale, np.float32)
            packed = pack_integers(
                weights, kept, "i4_dense", scales, group=group, mode="int8_dynamic"
            )
            assert packed.bytes == 16 * 64 / 2 + 64 + 64


@pytest.mark.parametrize("layout", ["f32_dense", "f32_bitmask", "f16_dense"])
@pytest.mark.parametrize("row", FAST)
def test_float_rows_agree_with_reference(row: str, layout: str) -> None:
    for n, k in SHAPES:
        packed, weights = float_case(layout, "0.6", (n, k))
        x = seeded(k).standard_normal((3, k)).astype(np.float32)
        reference = kernels.linear("reference", packed, x)
        exact = x.astype(np.float64) @ weights.astype(np.float64).T
        size = np.abs(x).astype(np.float64) @ np.abs(weights).astype(np.float64).T
        assert np.all(np.abs(reference - exact) <= size * k * 2.0**-24)
        assert same_bits(kernels.linear(row, packed, x), reference), (n, k)


@pytest.mark.parametrize(("row", "layout"), RUN)
def test_tokens_and_threads_change_nothing(row: str, layout: str) -> None:
    """Any number of tokens, any split of the panels: the same bits, and no byte outside y."""
    n, k = 85, 100
    if layout[0] == "i":
        pattern = half_kept(layout)
        cases = [
            integer_case(layout, pattern, (n, k), mode, group, half)[0]
            for mode, group in MODES
            for half in kinds(group)
        ]
    else:
        cases = [float_case(layout, "0.5", (n, k))[0]]
    x = seeded(2).standard_normal((70, k)).astype(np.float32)
    for packed in cases:
        one_by_one = np.concatenate([kernels.linear(row, packed, x[t : t + 1]) for t in range(70)])
        for m in (2, 3, 4, 5, 6, 7, 8, 9, 16, 23, 37, 70):
            for parts in (1, 2, 3, 9):
                y = kernels.linear(row, packed, x[:m], parts=parts, guard=17)
                assert same_bits(np.ascontiguousarray(y[:, 17:-17]), one_by_one[:m])
                assert np.all(y[:, :17] == -12345)
                assert np.all(y[:, -17:] == -12345)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("layout", INTEGER_LAYOUTS)
def test_weight_only_is_accurate_to_float_inputs(layout: str, group: int) -> None:
    """The error stays under half a step of each group's 15-bit grid, plus float32 rounding."""
    packed, weights, scales = integer_case(layout, half_kept(layout), (64, 576), "int16", group)
    real = weights * scales.astype(np.float64)
    x = seeded(3).standard_normal((4, 576)).astype(np.float32)
    x[1:, 11] *= 3000  # an outlier must not cost the other groups their precision
    span = group or 64
    largest = [np.abs(x[:, j : j + span]).max(axis=1) for j in range(0, 576, span)]
    step = np.repeat(np.stack(largest, axis=1) / 16256, span, axis=1)[:, :576]
    bound = step / 2 @ np.abs(real).T + np.abs(x) @ np.abs(real).T * 2.0**-20
    row = next(row for row in reversed(ROWS) if layout in kernels.layouts(row))
    error = np.abs(kernels.linear(row, packed, x) - x @ real.T)
    assert np.all(error <= bound)
    assert error[0].max() < 1e-4 * np.abs(x[0] @ real.T).max()


@pytest.mark.parametrize("row", ROWS)
def test_inputs_are_quantized_by_the_formula(row: str) -> None:
    for k in SIZES:
        x = seeded(k).standard_normal((3, k)).astype(np.float32)
        x[1] = 0
        x[2] = np.sign(x[2]) * 4  # halves: amax / scale is 127.5 exactly
        packed, _, _ = integer_case("i8_dense", "dense", (1, k), "int8_dynamic", 0)
        found = kernels.quantize(row, packed, x)
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127.5)
        safe = np.where(scale > 0, scale, np.float32(1))
        q = np.clip(np.round(x / safe), -128, 127).astype(np.int32)
        assert same_bits(found["scale"], scale)
        assert np.array_equal(found["q"][:, :k], q)
        assert not found["q"][:, k:].any()
        assert np.array_equal(found["wide"], found["q"])
        assert np.array_equal(found["sum"][:, 0], q.sum(axis=1))


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize(("mode", "group"), MODES)
def test_rows_quantize_inputs_alike(row: str, mode: str, group: int) -> None:
    strange = [np.nan, np.inf, -np.inf, 1e-45, 1e-38, 3e38, -3e38]
    for k in SIZES:
        packed, _, _ = integer_case("i8_dense", "dense", (1, k), mode, group)
        x = (seeded(k).standard_normal((2 + len(strange), k)) * 5).astype(np.float32)
        for token, value in enumerate(strange):
            x[token, k // 2] = value
        x[1, :] = (1e-44, 1e-40, 3.39e-41)[k % 3]  # their scales are hardly numbers any more
        expected = kernels.quantize("reference", packed, x)
        found = kernels.quantize(row, packed, x)
        for part, values in expected.items():
            assert same_bits(found[part], values), (k, part)
        if mode == "int16":
            assert np.abs(expected["q"]).max() <= 16256
            assert np.array_equal(expected["q"], expected["wide"])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("mode", "group"), MODES)
def test_nan_and_inf_come_out_as_nan(row: str, mode: str, group: int) -> None:
    packed, _, _ = integer_case("i8_bitmask", "0.5", (20, 70), mode, group)
    x = np.ones((4, 70), np.float32)
    x[1, 3], x[2, 69], x[3, 40] = np.nan, np.inf, -np.inf
    y = kernels.linear(row, packed, x)
    assert np.all(np.isfinite(y[0]))
    assert np.all(np.isnan(y[1:]))


@pytest.mark.parametrize(
    ("bits", "pattern", "layout"),
    [
        (8, "dense", "i8_dense"),
        (8, "0.1", "i8_dense"),  # 8 bytes of mask per 64 weights cost more than the zeros
        (8, "0.5", "i8_bitmask"),
        (8, "0.9", "i8_bitmask"),
        (8, "0.95", "i8_pairs"),  # what one of two rows keeps is stored of both, but half the masks
        (8, "blocks", "i8_block4"),
        (8, "2:4", "i8_2of4"),
        (8, "4:16", "i8_4of16"),
        (8, "8:16", "i8_bitmask"),  # masks as many, and no counts
        (8, "n:16", "i8_n16"),
        (8, "pairs", "i8_pairs"),
        (8, "columns", "i8_columns"),
        (4, "0.1", "i4_dense"),
        (4, "0.5", "i4_bitmask"),
        (4, "blocks", "i4_block4"),
        (4, "2:4", "i4_2of4"),
        (4, "4:16", "i4_4of16"),
        (4, "8:16", "i4_n16"),
        (4, "n:16", "i4_n16"),
        (4, "pairs", "i4_pairs"),
        (4, "columns", "i4_columns"),
    ],
)
def test_the_layout_with_the_fewest_bytes_is_chosen(bits: int, pattern: str, layout: str) -> None:
    """The reference row weighs only bytes; the others also what decoding costs them."""
    weights, kept = integers(pattern, bits, 64, 256)
    ones = np.ones((64, 1), np.float32)
    settings = {"row": "reference", "mode": "int8_dynamic"}
    packed = pack_integers(weights, kept, f"i{bits}_bitmask", ones, choose=True, **settings)
    assert packed.layout == layout
    for name in INTEGER_LAYOUTS:
        if name.startswith(f"i{bits}") and pattern in (*patterns(name), half_kept(name)):
            other = pack_integers(weights, kept, name, ones, mode="int8_dynamic")
            assert packed.bytes <= other.bytes + 64 * other.panels  # padding of a panel's end


@pytest.mark.parametrize("layout", ["i8_2of4", "i4_2of4", "i8_4of16", "i4_4of16"])
def test_a_fuller_window_than_the_layout_holds_is_refused(layout: str) -> None:
    weights, kept = integers("8:16", int(layout[1]), 17, 40)
    with pytest.raises(ValueError, match="keeps more weights"):
        pack_integers(weights, kept, layout, np.ones((17, 1), np.float32), mode="int8_dynamic")


GOOD: dict[str, Any] = {
    "n": 3,
    "k": 40,
    "dtype": "i8",
    "values": np.zeros(60, np.uint8),
    "mask": np.tile(np.array([255, 255, 15, 0, 0], np.uint8), (3, 1)),
    "scales": np.ones((3, 1), np.float32),
    "mode": "int8_dynamic",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "shape"),
        ({"k": 65537}, "columns"),
        ({"k": 41}, "mask"),
        ({"values": np.zeros(59, np.uint8)}, "59, expected 60"),
        ({"mask": np.zeros((3, 5), np.uint8)}, "expected 0"),
        ({"k": 39, "mask": np.full((3, 5), 255, np.uint8)}, "past column 39"),
        ({"mask": np.zeros(14, np.uint8)}, "14, expected 15"),
        ({"mask": None}, "60, expected 120"),
        ({"scales": None}, "scales"),
        ({"scales": np.ones((3, 2), np.float32)}, "6, expected 3"),
        ({"scales": np.full((3, 1), np.nan, np.float32)}, "not finite"),
        ({"group": 32}, "3, expected 6"),
        ({"group": 48}, "group must be"),
        ({"group": -32}, "group must be"),
        ({"mode": "f32"}, "activation mode"),
        ({"mode": "int8_static"}, "input scale"),
        ({"mode": "int8_static", "input_scale": float("inf")}, "input scale"),
        ({"mode": "int8_static", "input_scale": 1.0, "zero_point": 128}, "zero point"),
        ({"input_scale": 1.0}, "static"),
        ({"dtype": "i7"}, "dtype"),
        ({"layout": "f32_dense"}, "layout"),
    ],
)
def test_a_wrong_matrix_is_refused(change: dict[str, Any], message: str) -> None:
    assert kernels.pack(**GOOD).nonzeros == 60
    with pytest.raises(ValueError, match=message):
        kernels.pack(**{**GOOD, **change})
