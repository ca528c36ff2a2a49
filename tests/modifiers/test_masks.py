from __future__ import annotations

import pytest
import torch
from torch import nn

from paring.errors import LawError
from paring.modifiers import Masks


def test_a_held_zero_cannot_be_freed():
    masks = Masks()
    masks.hold("weight", torch.tensor([[True, False], [True, True]]))
    masks.hold("weight", torch.tensor([[True, False], [False, True]]))
    assert masks.sparsity("weight") == 0.5
    with pytest.raises(LawError, match="weight: 1 held zeros would be freed"):
        masks.hold("weight", torch.tensor([[True, True], [False, True]]))


def test_apply_reaches_weights_gradients_and_moments():
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    mask = torch.rand(4, 8) > 0.5
    masks = Masks()
    masks.hold("weight", mask)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert masks.violations(model) == masks.gradient_violations(model) == ["weight"]
    assert set(masks.moment_violations(model, optimizer)) == {"weight"}
    masks.apply(model)
    masks.apply_to_gradients(model)
    masks.apply_to_moments(model, optimizer)
    assert not masks.violations(model)
    assert not masks.gradient_violations(model)
    assert not masks.moment_violations(model, optimizer)
    assert model.weight[mask].ne(0).all()


def test_apply_removes_infinity_too():
    model = nn.Linear(2, 1)
    model.weight.data[:] = torch.tensor([[float("inf"), 1.0]])
    masks = Masks()
    masks.hold("weight", torch.tensor([[False, True]]))
    masks.apply(model)
    assert model.weight.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_apply_changes_no_bit_of_what_is_kept(dtype):
    values = torch.tensor([[1.5, -2.0, 0.0, -0.0], [float("nan"), float("inf"), 1e-7, 3.0]])
    model = nn.Linear(4, 2, bias=False, dtype=dtype)
    model.weight.data = values.to(dtype).t().contiguous().t()  # not contiguous
    mask = torch.tensor([[True, False, True, True], [False, False, True, True]])
    masks = Masks()
    masks.hold("weight", mask)
    assert masks.violations(model) == ["weight"]
    masks.apply(model)
    assert not masks.violations(model)
    assert torch.equal(model.weight.detach(), torch.where(mask, values.to(dtype), 0))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_state_is_exact(columns):
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) > 0.5
    masks, other = Masks(), Masks()
    masks.hold("w", mask)
    other.load_state_dict(masks.state_dict())
    assert torch.equal(other["w"], mask)
