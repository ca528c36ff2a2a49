"""Wanda, ADMM, magnitude and constant pruning."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from paring.modifiers import Session
from paring.modifiers.hessian import Gram
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.constant import ConstantPruning
from paring.modifiers.pruning.magnitude import MagnitudePruning
from paring.modifiers.pruning.wanda import Wanda


def prune(algorithm, gram, weights, kept):
    """What the algorithm makes of some weights that share an input."""
    tasks = [algorithm.layer("", *pair) for pair in zip(weights, kept, strict=True)]
    return algorithm.prune(gram, tasks, {})


def layer() -> tuple[torch.Tensor, torch.Tensor, Gram]:
    torch.manual_seed(0)
    x = torch.randn(100, 16) @ torch.randn(16, 16)
    gram = Gram()
    gram.add(x)
    return torch.randn(6, 16), x, gram


def test_wanda_removes_the_lowest_of_each_row():
    weight, x, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(Wanda(sparsity=0.5), gram, [weight], [kept])
    for row in range(6):
        scores = [abs(float(weight[row, j])) * float(x[:, j].norm()) for j in range(16)]
        lowest = sorted(range(16), key=lambda j: scores[j])[:8]
        assert sorted((~mask[row]).nonzero().flatten().tolist()) == sorted(lowest)
    assert torch.equal(after[mask], weight[mask])


def test_admm_reaches_the_masked_least_squares_optimum():
    weight, _, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    algorithm = ADMMPruning(sparsity=0.5, iterations=3000)
    ((after, mask),) = prune(algorithm, gram, [weight], [kept])
    norms = gram.matrix.diagonal().sqrt()
    a = gram.matrix / torch.outer(norms, norms)
    a.diagonal().add_(0.1 * float(a.diagonal().mean()))
    for row in range(6):  # argmin over the support of (w - w0) A (w - w0)'
        support = mask[row]
        w0 = weight[row] * norms
        best = torch.linalg.solve(a[support][:, support], (a @ w0)[support])
        assert torch.allclose(after[row, support] * norms[support], best, atol=2e-3)


def test_admm_beats_wanda():
    weight, _, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    errors = []
    for algorithm in (ADMMPruning(sparsity=0.5), Wanda(sparsity=0.5)):
        ((after, mask),) = prune(algorithm, gram, [weight], [kept])
        errors.append(gram.relative_error(weight, after * mask))
    assert errors[0] < 0.5 * errors[1]


def loop(session: Session, steps: int) -> None:
    """A training loop without training: the clock alone."""
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.0)
    for _ in range(steps):
        session.before_step()
        session.before_optimizer()
        session.after_step(optimizer)


@pytest.mark.parametrize("scheduler", ["cubic", "linear"])
def test_gradual_magnitude_follows_its_ramp_at_every_step(pico, scheduler):
    model = pico()
    pruning = MagnitudePruning(
        init_sparsity=0.1,
        final_sparsity=0.6,
        start=0.5,
        end=2.0,
        update_scheduler=scheduler,
        ignore=["lm_head"],
    )
    session = Session(model, [pruning])
    session.begin(steps_per_epoch=10, total_steps=30)
    name = "model.layers.0.mlp.up_proj.weight"
    size = model.get_parameter(name).numel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(30):
        session.before_step()
        p = min(max((step - 5) / 15, 0.0), 1.0)
        eased = p if scheduler == "linear" else (p - 1) ** 3 + 1
        wanted = 0.0 if step < 5 else round((0.1 + 0.5 * eased) * size) / size
        zeros = int((model.get_parameter(name) == 0).sum()) / size
        assert zeros == wanted, step
        session.before_optimizer()
        session.after_step(optimizer)
    session.finish()
    assert all(
        mask.sum() == mask.numel() - round(0.6 * mask.numel()) for _, mask in session.masks.items()
    )


def test_update_frequency_is_kept(pico):
    model = pico()
    pruning = MagnitudePruning(init_sparsity=0.0, final_sparsity=0.8, end=1.0, update_frequency=0.3)
    session = Session(model, [pruning])
    session.begin(steps_per_epoch=10, total_steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    changed, last = [], -1
    for step in range(12):
        session.before_step()
        zeros = sum(int((~mask).sum()) for _, mask in session.masks.items())
        if zeros != last:
            changed.append(step)
            last = zeros
        session.before_optimizer()
        session.after_step(optimizer)
    assert changed == [0, 3, 6, 9, 10]


def test_a_window_to_the_end_reaches_the_final_value_in_finish(pico):
    model = pico()
    session = Session(model, [MagnitudePruning(init_sparsity=0.1, final_sparsity=0.5)])
    session.begin(5, 5)
    loop(session, 5)
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") < 0.5
    session.finish()
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") == 0.5


def test_global_sparsity_is_one_threshold(pico):
    model = pico()
    model.model.layers[0].mlp.up_proj.weight.data *= 0.1
    before = {n: w.clone() for n, w in Session(model).weights(["Linear"], ["lm_head"])}
    session = Session(
        model, [MagnitudePruning(sparsity=0.5, global_sparsity=True, ignore=["lm_head"])]
    )
    session.run_oneshot()
    kept = min(float(before[n][m].abs().min()) for n, m in session.masks.items() if m.any())
    removed = max(float(before[n][~m].abs().max()) for n, m in session.masks.items() if not m.all())
    assert kept >= removed
    total = sum(m.numel() for _, m in session.masks.items())
    assert sum(int((~m).sum()) for _, m in session.masks.items()) == round(0.5 * total)
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either sparsity or final_sparsity"),
        ({"sparsity": 0.5, "final_sparsity": 0.6}, "give either"),
        ({"init_sparsity": 0.7, "final_sparsity": 0.6}, "is above final_sparsity"),
        ({"sparsity": 0.6, "mask_structure": "2:4"}, "2:4 is 0.5 sparse"),
        (
            {"sparsity": 0.5, "mask_structure": "2:4", "global_sparsity": True},
            "only with mask_structure",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MagnitudePruning(**settings)


def test_constant_holds_what_is_zero_and_keeps_masks_there_are(pico):
    model = pico()
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[::2] = 0
    session = Session(model, [ConstantPruning(targets=["up_proj", "down_proj"])])
    down = torch.ones(32, 64, dtype=torch.bool)
    session.masks.hold("model.layers.0.mlp.down_proj.weight", down)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 0  # by chance: kept
    session.run_oneshot()
    assert torch.equal(session.masks["model.layers.0.mlp.up_proj.weight"], up != 0)
    assert session.masks["model.layers.0.mlp.down_proj.weight"].all()
