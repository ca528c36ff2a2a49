"""Pruning by what training says: movement and second-order scores, against plain formulas."""

from __future__ import annotations

import pytest
import torch

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.pruning.movement import MovementPruning
from paring.modifiers.pruning.second_order import OBSPruning, blocks, compensate

UP = "model.layers.0.mlp.up_proj.weight"
KINDS = [MovementPruning, OBSPruning]


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def run(model, modifier, count: int, each=None) -> Session:
    session = Session(model, [modifier])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session.begin(2, count)
    for _ in range(count):
        session.before_step()
        data = batch(session.step)
        outputs = model(**data)
        session.loss(outputs.loss, data, outputs).backward()
        session.before_optimizer(optimizer)
        if each:
            each(session)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(optimizer)
    return session


def zeros(model) -> float:
    weight = model.get_parameter(UP)
    return 1 - int(weight.count_nonzero()) / weight.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_is_kept_from_the_second_update_on(pico, kind):
    model, seen = pico(), []
    modifier = kind(
        init_sparsity=0.2, final_sparsity=0.6, ignore=["lm_head"], update_scheduler="linear"
    )
    session = run(model, modifier, 4, lambda session: seen.append(zeros(model)))
    assert seen == pytest.approx([0, 0.3, 0.4, 0.5], abs=1e-3)
    session.finish()
    assert zeros(model) == pytest.approx(0.6, abs=1e-3)
    assert not modifier.state_dict().get("_scores")
    assert not modifier.state_dict().get("_fisher")


def test_movement_removes_what_moves_towards_zero(pico):
    model = pico()
    modifier = MovementPruning(milestones={1: 0.3}, ignore=["lm_head"])
    wanted = torch.zeros_like(model.get_parameter(UP))
    before = {}

    def watch(session: Session) -> None:
        weight = model.get_parameter(UP)
        if session.step < 2:
            wanted.sub_(weight.detach() * weight.grad)
        else:
            before["zero"] = weight.detach() == 0

    run(model, modifier, 3, watch)
    removed = before["zero"]
    assert int(removed.sum()) == round(0.3 * removed.numel())
    assert wanted[removed].max() <= wanted[~removed].min()
    assert wanted.min() < 0 < wanted.max()


def test_second_order_scores_are_the_formula_weight_by_weight(pico):
    model = pico()
    modifier = OBSPruning(milestones={1: 0.3}, fisher_block_size=4, decay=0.5, ignore=["lm_head"])
    gradients, weights = [], []

    def watch(session: Session) -> None:
        weights.append(model.get_parameter(UP).detach().clone())
        gradients.append(model.get_parameter(UP).grad.clone())
        if session.step == 1:
            now = {UP: weights[-1]} | {
                n: model.get_parameter(n) for n in modifier._fisher if n != UP
            }
            found.update(modifier.scores(session, now))

    found: dict[str, torch.Tensor] = {}
    run(model, modifier, 2, watch)
    first, second = (g.reshape(-1, 4).double() for g in gradients)
    fisher = torch.stack(
        [
            0.25 * torch.outer(a, a) + 0.5 * torch.outer(b, b)
            for a, b in zip(first, second, strict=True)
        ]
    )
    mean = fisher.diagonal(dim1=1, dim2=2).mean()
    w = weights[1].reshape(-1, 4).double()
    for index in (0, 7, len(w) - 1):
        inverse = torch.linalg.inv(fisher[index] / mean + 0.01 * torch.eye(4))
        expected = w[index] ** 2 / (2 * inverse.diagonal())
        score = found[UP].reshape(-1, 4)[index].double()
        assert torch.allclose(score, expected, rtol=2e-3)


def test_one_threshold_for_all_layers_is_in_the_units_of_the_loss(pico):
    """Equation 6 scales with the curvature: a layer that the loss minds 100 times as much scores as much higher."""
    model = pico()
    modifier = OBSPruning(
        sparsity=0.5, global_sparsity=True, fisher_block_size=4, targets=["up_proj"]
    )
    session = Session(model, [modifier])
    weight = model.get_parameter(UP).detach()
    root = torch.randn(weight.numel() // 4, 4, 4, generator=torch.Generator().manual_seed(0))
    fisher = root @ root.transpose(1, 2)
    modifier._fisher = {"a": fisher, "b": 100 * fisher, "never reached": 0 * fisher}
    found = modifier.scores(session, dict.fromkeys(modifier._fisher, weight))
    assert torch.allclose(found["b"], 100 * found["a"], rtol=1e-4)
    assert (found["never reached"] == 0).all()
    damped = fisher[3] + 0.01 * fisher.diagonal(dim1=1, dim2=2).mean() * torch.eye(4)
    expected = weight.flatten()[12:16] ** 2 / (2 * torch.linalg.inv(damped).diagonal())
    assert torch.allclose(found["a"].flatten()[12:16], expected, rtol=2e-3)


def test_times_after_the_end_of_a_shortened_stage_are_told(pico):
    late = MovementPruning(milestones={1: 0.3, 4: 0.5}, ignore=["lm_head"])
    with pytest.raises(ModelError, match="milestones has 4 .epochs., step 8, but the stage has 6"):
        Session(pico(), [late]).begin(2, 6)


def test_what_stays_makes_up_for_what_goes():
    torch.manual_seed(0)
    root = torch.randn(5, 6, 6, dtype=torch.float64)
    fisher = root @ root.transpose(1, 2) + 0.1 * torch.eye(6)
    weights = torch.randn(5, 6, dtype=torch.float64)
    kept = torch.rand(5, 6) > 0.4
    after = compensate(weights, fisher, kept)
    assert (after[~kept] == 0).all()
    for w, f, k, a in zip(weights, fisher, kept, after, strict=True):
        gradient = f @ (a - w)  # of the quadratic: zero in every free direction
        assert gradient[k].abs().max() < 1e-9
        plain = torch.where(k, 0.0, -w)
        assert (a - w) @ f @ (a - w) <= plain @ f @ plain


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_get_no_gradient_are_an_error_and_not_left_dense(pico, kind):
    model = pico()
    model.get_parameter(UP).requires_grad_(False)
    session = run(model, kind(sparsity=0.5, ignore=["lm_head"]), 2)
    with pytest.raises(ModelError, match="without a gradient of every target"):
        session.finish()


def test_blocks_fill_up_the_last_one():
    assert blocks(torch.arange(1.0, 11.0).reshape(2, 5), 4).tolist()[2] == [9, 10, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_global_and_structured_masks_work_with_these_scores(pico, kind):
    model = pico()
    session = run(model, kind(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"]), 3)
    kept = session.masks[UP].reshape(-1, 4).sum(dim=1)
    assert (kept == 2).all()
    model = pico()
    session = run(model, kind(sparsity=0.5, global_sparsity=True, ignore=["lm_head"]), 3)
    total = sum(int(mask.sum()) for _, mask in session.masks.items())
    assert total == pytest.approx(
        0.5 * sum(mask.numel() for _, mask in session.masks.items()), abs=1
    )
