"""Schedules in a session: units, milestones, the learning rate, frozen parameters."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers import Modifier, Session
from paring.modifiers.pruning.magnitude import MagnitudePruning
from paring.modifiers.schedule import ramp, stepped
from paring.modifiers.training.learning_rate import LearningRate
from paring.modifiers.training.trainable_params import TrainableParams

UP = "model.layers.0.mlp.up_proj.weight"


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def train(session: Session, optimizer, per_epoch: int, total: int, scheduler=None, each=None):
    """A plain loop; `each(session)` is called before each optimizer step, when gradients are ready."""
    session.begin(per_epoch, total)
    for _ in range(total):
        session.before_step()
        data = batch(session.step)
        outputs = session.model(**data)
        session.loss(outputs.loss, data, outputs).backward()
        session.before_optimizer(optimizer)
        if each:
            each(session)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the harder case: gradients of zero
        session.after_step(optimizer)
        if scheduler:
            scheduler.step()
    session.finish()


def test_the_polynomial_is_its_formula_and_holds_the_cubic_and_the_line():
    for p in (0.0, 0.3, 0.9, 1.0):
        assert ramp("polynomial", 0, 1, p, power=1) == pytest.approx(p)
        assert ramp("polynomial", 0.2, 0.8, p) == pytest.approx(ramp("cubic", 0.2, 0.8, p))
        assert ramp("polynomial", 0, 2, p, power=5) == pytest.approx(2 * (1 - (1 - p) ** 5))
        assert ramp("cosine", 0, 1, p) == pytest.approx((1 - math.cos(math.pi * p)) / 2)


def test_steps_take_the_last_value_reached():
    values = [stepped(0.1, {1: 0.5, 2: 0.7}, lambda t, now=now: t <= now) for now in (0, 1, 1.5, 2)]
    assert values == [0.1, 0.5, 0.5, 0.7]


def test_milestones_prune_at_their_steps_and_not_before(pico):
    model = pico()
    modifier = MagnitudePruning(milestones={"0.4": 0.6, "0.3": 0.2}, ignore=["lm_head"])
    assert list(modifier.milestones) == [0.3, 0.4]
    session, seen = Session(model, [modifier]), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def note(session: Session) -> None:
        size = model.get_parameter(UP).numel()
        seen.append(round(1 - int(model.get_parameter(UP).count_nonzero()) / size, 2))

    train(session, optimizer, 10, 6, each=note)
    assert seen == [0, 0, 0, 0.2, 0.6, 0.6]  # 0.3 epochs of 10 steps is step 3


@pytest.mark.parametrize(
    "fields",
    [
        {"milestones": {1: 0.6, 2: 0.5}},
        {"milestones": {1: 1.0}},
        {"milestones": {}},
        {"milestones": {-1: 0.5}},
        {"milestones": {3: 0.5}, "end": 2},
        {"milestones": {1: 0.5}, "final_sparsity": 0.5},
        {"init_sparsity": 0.5, "milestones": {1: 0.4}},
        {"sparsity": 0.5, "unit": "steps", "start": 0.5},
        {"milestones": {1.5: 0.5}, "unit": "steps"},
        {"sparsity": 0.5, "unit": "hours"},
    ],
)
def test_schedules_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValidationError):
        MagnitudePruning(**fields)


def test_a_window_in_steps_is_in_steps(pico, own_registry):
    class Watching(Modifier):
        def on_start(self, session: Session) -> None:
            seen.append(("start", session.step))

        def on_update(self, session: Session) -> None:
            seen.append(("update", session.step))

        def on_end(self, session: Session) -> None:
            seen.append(("end", session.step))

    seen: list[tuple[str, int]] = []
    model = pico()
    session = Session(model, [Watching(unit="steps", start=2, end=6, update_frequency=3)])
    train(session, torch.optim.SGD(model.parameters(), lr=1e-3), 100, 8)
    assert seen == [("start", 2), ("update", 2), ("update", 5), ("end", 6)]
    for window in ({"start": 8}, {"end": 9}):
        with pytest.raises(ModelError, match="the stage has 8 steps"):
            Session(model, [Watching(unit="steps", **window)]).begin(100, 8)


def test_the_rate_is_ours_inside_the_window_and_the_schedulers_outside(pico):
    model = pico()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # A scheduler that computes each rate from the last one: it would go astray if it saw ours.
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    modifier = LearningRate(init_lr=0.1, final_lr=0.0, unit="steps", start=2, end=6)
    session, used = Session(model, [modifier]), []
    note = lambda session: used.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    train(session, optimizer, 4, 8, scheduler, note)
    theirs = [0.5 * 0.9**step for step in range(9)]
    ours = [0.1, 0.075, 0.05, 0.025]
    assert used == pytest.approx([*theirs[:2], *ours, *theirs[6:8]])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs[8])
    assert session.take_logs()["learning_rate"] == pytest.approx(sum(ours) / 4)


def test_the_step_is_made_with_that_rate(pico):
    model, plain = pico(), pico()
    other = torch.optim.SGD(plain.parameters(), lr=0.05)
    train(Session(plain, []), other, 2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    train(Session(model, [LearningRate(init_lr=0.05)]), optimizer, 2, 1)
    for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_milestones_and_the_later_of_two_rates(pico):
    model, used = pico(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    modifiers = [
        LearningRate(init_lr=0.1, milestones={1: 0.01}),
        LearningRate(init_lr=0.3, start=1.5, end=2),
    ]
    note = lambda session: used.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    train(Session(model, modifiers), optimizer, 2, 5, None, note)
    assert used == [0.1, 0.1, 0.01, 0.3, 0.01]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (
        optimizer.param_groups[0].keys() == torch.optim.SGD([torch.zeros(1)]).param_groups[0].keys()
    )


def test_without_an_optimizer_the_rate_is_an_error(pico):
    session = Session(pico(), [LearningRate(init_lr=0.1)])
    session.begin(1, 1)
    session.before_step()
    with pytest.raises(ModelError, match=r"session\.before_optimizer\(optimizer\)"):
        session.before_optimizer()


@pytest.mark.parametrize("trainable", [False, True])
def test_frozen_parameters_do_not_move_not_even_by_decay(pico, trainable):
    model = pico()
    modifier = TrainableParams(
        targets=["re:model.layers.0$", "embed_tokens"], trainable=trainable, start=1, end=2
    )
    session = Session(model, [modifier])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    frozen = {
        name
        for name, _ in model.named_parameters()
        if (name.startswith("model.layers.0.") or "embed" in name) is not trainable
    }
    assert 0 < len(frozen) < len(list(model.parameters()))
    before: dict[str, torch.Tensor] = {}

    def look(session: Session) -> None:
        moved = {n for n, p in model.named_parameters() if n in before and (p != before[n]).any()}
        if session.step:
            inside = 2 <= session.step - 1 < 4
            everything = {name for name, _ in model.named_parameters()}
            assert moved == (everything - frozen if inside else everything), session.step
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        inside = 2 <= session.step < 4
        assert {n for n, p in model.named_parameters() if p.grad is None} == (
            frozen if inside else set()
        )

    train(session, optimizer, 2, 6, each=look)
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_everything_is_an_error(pico):
    with pytest.raises(ModelError, match="whole model"):
        Session(pico(), [TrainableParams(targets=["re:.*"])]).begin(1, 1)
