"""How much outputs matter, against gradients taken one token at a time."""

from __future__ import annotations

import pytest
import torch

from paring.modifiers import Session
from paring.modifiers.hessian import Gram
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.output_weights import output_shares, output_weights

UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))


def shares(model, calibration):
    linears = {name: model.get_submodule(name) for name in (UP, DOWN)}
    return output_shares(model, linears, calibration[:2], seed=0)


def test_shares_are_squared_gradients_times_squared_outputs(pico, calibration):
    model = pico()
    found = shares(model, calibration)
    outputs = {}
    up = model.get_submodule(UP)
    handle = up.register_forward_hook(lambda m, args, out: outputs.update(up=out))
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    size = 0.0
    tokens = calibration[:2]
    for row in tokens:
        with torch.enable_grad():
            logits = model(row[None]).logits[0]
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = -logits.log_softmax(-1)[torch.arange(len(row)), labels].sum()
            (gradient,) = torch.autograd.grad(loss, outputs["up"])
        expected = expected + gradient[0].square().sum(0)
        size = size + outputs["up"].detach()[0].square().sum(0)
    handle.remove()
    count = tokens.numel()
    assert torch.allclose(found[UP], expected * size / count**2, rtol=1e-3)


def test_shares_do_not_mind_a_rescaling(pico, calibration):
    model = pico()
    before = shares(model, calibration)
    factor = torch.rand(model.get_submodule(UP).weight.shape[0]) * 9 + 0.1
    model.get_submodule(UP).weight.data /= factor.unsqueeze(1)
    model.get_submodule(DOWN).weight.data *= factor
    after = shares(model, calibration)
    for name in (UP, DOWN):
        assert torch.allclose(before[name], after[name], rtol=1e-2)


def test_weights_are_what_an_error_counts_now():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 8), torch.randn(4, 8)
    weight[3] = 0  # an output that is always zero
    gram = Gram()
    gram.add(x)
    importance = torch.tensor([1.0, 4.0, 1e-9, 5.0])
    share = importance * (x @ weight.T).square().mean(0)
    found = output_weights(share, weight, gram)
    assert torch.allclose(found[1] / found[0], torch.tensor(2.0))
    mean = (importance[:3].sum() / 4).item()
    assert torch.allclose(found[0], torch.tensor((1 / mean) ** 0.5))
    assert torch.allclose(found[2:], torch.tensor(1e-3).sqrt())
    assert torch.equal(output_weights(torch.zeros(4), weight, gram), torch.ones(4))


@pytest.mark.parametrize("weighed", [True, False])
def test_admm_keeps_more_where_outputs_matter_more(pico, calibration, weighed):
    model = pico()
    down = model.get_submodule(DOWN)
    half = down.weight.shape[1] // 2
    down.weight.data[:, :half] *= 0.01  # so the first half of up_proj's outputs hardly matters
    settings = {"sparsity": 0.5, "output_importance": weighed, "ignore": ["lm_head"]}
    session = Session(model, [ADMMPruning(**settings)])
    session.run_oneshot(calibration)
    kept = session.masks[f"{UP}.weight"].float().mean(dim=1)
    if weighed:
        assert kept[half:].mean() > 2 * kept[:half].mean()
    else:
        assert abs(kept[half:].mean() - kept[:half].mean()) < 0.1
    assert session.masks.sparsity(f"{UP}.weight") == 0.5


def test_admm_needs_no_gradients_for_n_of_m(pico, calibration, monkeypatch):
    model = pico()
    backward = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: backward.append(args))
    Session(model, [ADMMPruning(mask_structure="2:4", ignore=["lm_head"])]).run_oneshot(calibration)
    assert not backward


def test_a_modifier_used_again_looks_again(pico, calibration):
    modifier = ADMMPruning(sparsity=0.5, ignore=["lm_head"])
    masks = []
    for used in (modifier, modifier, ADMMPruning(sparsity=0.5, ignore=["lm_head"])):
        model = pico(len(masks) > 0)
        session = Session(model, [used])
        session.run_oneshot(calibration)
        masks.append(session.masks[f"{UP}.weight"])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])
