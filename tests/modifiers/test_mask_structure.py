from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paring.errors import ModelError
from paring.modifiers.mask_structure import BLOCKS, MaskStructure


def scores(rows: int = 32, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16", "4:16", "1:4"])
def test_n_of_m_keeps_the_highest_n_of_every_m(text):
    n, m = map(int, text.split(":"))
    structure = MaskStructure.parse(text)
    assert structure.sparsity == 1 - n / m
    s = scores()
    mask = structure.mask(s, structure.sparsity)
    for group, kept in zip(s.reshape(-1, m), mask.reshape(-1, m), strict=True):
        assert kept.sum() == n
        assert set(kept.nonzero().flatten().tolist()) == set(group.topk(n).indices.tolist())


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_live_and_die_as_one(text):
    rows, columns = map(int, text.split("x"))
    s = scores()
    mask = MaskStructure.parse(text).mask(s, 0.5)
    tiles = mask.reshape(32 // rows, rows, 64 // columns, columns).transpose(1, 2).flatten(2)
    assert (tiles.all(dim=2) | ~tiles.any(dim=2)).all()
    assert mask.float().mean() == 0.5
    sums = s.reshape(32 // rows, rows, 64 // columns, columns).sum(dim=(1, 3))
    alive = tiles.all(dim=2)
    assert sums[alive].min() >= sums[~alive].max()


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


def test_negative_scores_go_first():
    s = scores()
    s[:, ::4] = -1
    for text in ("unstructured", "2:4"):
        mask = MaskStructure.parse(text).mask(s, 0.5)
        assert not mask[:, ::4].any()


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "3x3", "dense", "2 : 4"])
def test_unknown_patterns_are_refused(text):
    with pytest.raises(ValueError, match="is not a mask structure; use unstructured, N:M"):
        MaskStructure.parse(text)


@pytest.mark.parametrize(("text", "shape"), [("2:4", (8, 30)), ("16x1", (24, 8)), ("1x4", (3, 9))])
def test_shapes_that_do_not_divide_are_refused(text, shape):
    with pytest.raises(ModelError, match=r"q_proj is .* does not divide"):
        MaskStructure.parse(text).check("q_proj", shape)
