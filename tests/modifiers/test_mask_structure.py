"""Every pattern against a plain, slow search, and every scorer with every pattern."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers import Session, mask_structure
from paring.modifiers.mask_structure import MaskStructure
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.magnitude import MagnitudePruning
from paring.modifiers.pruning.sparsegpt import SparseGPT
from paring.modifiers.pruning.wanda import Wanda

BLOCKS = ["1x4", "4x1", "16x1", "2x1"]
N_OF_M = ["2:4", "4:8", "8:16", "4:16", "1:4", "3:5"]


def scores(rows: int = 32, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", N_OF_M)
def test_n_of_m_keeps_the_highest_n_of_every_m(text):
    n, m = map(int, text.split(":"))
    structure = MaskStructure.parse(text)
    assert structure.sparsity == 1 - n / m
    s = scores(columns=16 * m)
    mask = structure.mask(s, structure.sparsity)
    for group, kept in zip(s.reshape(-1, m), mask.reshape(-1, m), strict=True):
        assert kept.sum() == n
        assert set(kept.nonzero().flatten().tolist()) == set(group.topk(n).indices.tolist())


def members(text: str, row: int, column: int) -> list[tuple[int, int]]:
    """The weights of the block that [row, column] is in, by the plain meaning of the pattern."""
    height, width = map(int, text.split("x"))
    left = column - column % width
    top = row - row % height
    return [(top + i, left + j) for i in range(height) for j in range(width)]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_live_and_die_as_one_by_their_sums(text, per_row):
    s = scores()
    mask = MaskStructure.parse(text).mask(s, 0.5, per_row=per_row)
    assert mask.float().mean() == 0.5
    found: dict[bool, list[float]] = {True: [], False: []}
    for row, column in itertools.product(range(32), range(64)):
        block = members(text, row, column)
        assert len({bool(mask[at]) for at in block}) == 1
        found[bool(mask[row, column])].append(sum(float(s[at]) for at in block))
    if not per_row:
        assert min(found[True]) >= max(found[False]) - 1e-5


def test_a_block_with_a_weight_gone_is_judged_by_the_rest():
    s = torch.ones(1, 8)
    s[
        0, 0
    ] = -1.0  # gone already; the other three of its block are worth more than the second block
    s[0, 1:4] = 9.0
    assert MaskStructure.parse("1x4").mask(s, 0.5).tolist() == [[True] * 4 + [False] * 4]
    s[0, :4] = -1.0
    assert MaskStructure.parse("1x4").mask(s, 0.5).tolist() == [[False] * 4 + [True] * 4]


@given(st.integers(0, 100), st.integers(0, 3), st.booleans())
def test_unstructured_removes_exactly_the_count_even_with_ties(percent, levels, per_row):
    s = (scores() * levels).round()  # many equal scores
    mask = MaskStructure.parse("unstructured").mask(s, percent / 100, per_row=per_row)
    if per_row:
        assert ((~mask).sum(dim=1) == round(percent / 100 * 64)).all()
    else:
        assert (~mask).sum() == round(percent / 100 * 32 * 64)
    if mask.any() and not mask.all() and not per_row:
        assert s[mask].min() >= s[~mask].max()


@pytest.mark.parametrize("seed", range(4))
def test_tiles_find_the_best_mask_that_the_budget_allows(seed):
    """Brute force over every n of every tile; 3 tiles, each with row sums of its own."""
    s = scores(16, 48, seed) ** 3 * torch.tensor([1.0, 0.3, 2.0]).repeat_interleave(16)
    tops = [s[:, 16 * t : 16 * t + 16].sort(dim=1, descending=True).values for t in range(3)]
    for steps in range(13):
        best = max(
            sum(float(top[:, :n].sum()) for top, n in zip(tops, choice, strict=True))
            for choice in itertools.product((0, 4, 8, 12, 16), repeat=3)
            if sum(choice) == 4 * steps
        )
        mask = MaskStructure.parse("n:16").mask(s, 1 - steps / 12)
        assert mask.sum() == 64 * steps
        counts = mask.reshape(16, 3, 16).sum(dim=2)
        assert (counts == counts[0]).all()
        assert float(s[mask].sum()) == pytest.approx(best, rel=1e-5)


@given(st.floats(0, 0.999), st.integers(0, 3))
def test_tiles_meet_their_budget_to_within_half_a_step_even_with_ties(sparsity, levels):
    s = (scores() * levels).round()
    s[3] = -1.0
    mask = MaskStructure.parse("n:16").mask(s, sparsity)
    assert abs(int((~mask).sum()) - sparsity * s.numel()) <= 32 + 1e-6
    counts = mask.reshape(2, 16, 4, 16).sum(dim=3)
    assert (counts == counts[:, :1]).all()
    assert set(counts.unique().tolist()) <= {0, 4, 8, 12, 16}


def test_tiles_settle_n_before_the_loop_and_the_places_in_it():
    first, later = scores(seed=1), scores(seed=2)
    structure = MaskStructure.parse("n:16")
    choose = structure.chooser(first, 0.6)
    mask = torch.cat([choose(j, later[:, j : j + 16]) for j in range(0, 64, 16)], dim=1)
    counts = structure.mask(first, 0.6).reshape(32, 4, 16).sum(dim=2)
    assert torch.equal(mask.reshape(32, 4, 16).sum(dim=2), counts)
    for row, tile in itertools.product(range(32), range(4)):
        window = slice(16 * tile, 16 * tile + 16)
        best = later[row, window].topk(int(counts[row, tile])).indices
        assert set(mask[row, window].nonzero().flatten().tolist()) == set(best.tolist())


def test_negative_scores_go_first():
    s = scores()
    s[:, ::4] = -1
    for text in ("unstructured", "2:4", "n:16"):
        mask = MaskStructure.parse(text).mask(s, 0.5)
        assert not mask[:, ::4].any()


@pytest.mark.parametrize(
    "text",
    [
        "4:2",
        "0:4",
        "4:4",
        "3x3",
        "dense",
        "2 : 4",
        "",
        "n:32",
        "2:4\n",
        "٢:٤",
        "1:9999999",
        "1x4x4",
    ],
)
def test_unknown_patterns_are_refused(text):
    with pytest.raises(ValueError, match="is not a mask structure; use unstructured, N:M|n:16"):
        MaskStructure.parse(text)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("2:4", (8, 30)),
        ("16x1", (24, 8)),
        ("1x4", (3, 9)),
        ("2x1", (47, 8)),
        ("n:16", (24, 32)),
        ("n:16", (32, 24)),
    ],
)
def test_shapes_that_do_not_divide_are_refused(text, shape):
    with pytest.raises(ModelError, match=r"q_proj is .* does not divide: it takes multiples of"):
        MaskStructure.parse(text).check("q_proj", shape)


def test_two_patterns_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(mask_structure, "_registry", dict(mask_structure._registry))

    class Impostor(type(MaskStructure.parse("2:4"))):
        pass

    with pytest.raises(ValueError, match="is a mask structure of two modules"):
        MaskStructure.parse("2:4")


def test_structures_are_values():
    assert MaskStructure.parse("2:4") == MaskStructure.parse("2:4") != MaskStructure.parse("1:4")
    assert len({MaskStructure.parse("2:4"), MaskStructure.parse("2:4")}) == 1


@pytest.mark.parametrize("text", ["unstructured", *BLOCKS, "2:4", "4:8", "8:16", "4:16", "n:16"])
@pytest.mark.parametrize("scorer", [SparseGPT, Wanda, ADMMPruning, MagnitudePruning])
def test_every_scorer_with_every_structure(pico, calibration, scorer, text):
    structure = MaskStructure.parse(text)
    sparsity = structure.sparsity or 0.5
    settings = (
        {} if structure.sparsity and scorer is not MagnitudePruning else {"sparsity": sparsity}
    )
    ignore = ["lm_head", "k_proj", "v_proj"]  # 16 rows: not enough for pairs
    session = Session(pico(), [scorer(mask_structure=text, ignore=ignore, **settings)])
    session.run_oneshot(calibration)
    assert len(session.masks) == 10
    for name, mask in session.masks.items():
        assert torch.equal(mask, structure.mask(mask.float(), sparsity)), name
        assert 1 - float(mask.float().mean()) == pytest.approx(sparsity, abs=1e-6), name
        assert not session.model.get_parameter(name)[~mask].any()
    layers = session.report[scorer.key()].get("layers", {})
    assert all(0 < layer["error"] < 1 for layer in layers.values())
    assert len(layers) == (0 if scorer is MagnitudePruning else 10)


@pytest.mark.parametrize("text", ["16x1", "n:16"])
def test_a_layer_that_does_not_divide_is_named(pico, calibration, text):
    session = Session(pico(), [SparseGPT(mask_structure=text, sparsity=0.5, targets=["k_proj"])])
    session.model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros(24, 32))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj is 24 x 32, which"):
        session.run_oneshot(calibration)


def test_a_recipe_with_an_unknown_structure_is_told_what_there_is():
    with pytest.raises(ValidationError, match="use unstructured.*N:M.*n:16"):
        SparseGPT(sparsity=0.5, mask_structure="2x2")
