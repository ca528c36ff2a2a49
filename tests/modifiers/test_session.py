from __future__ import annotations

import pytest
import torch

from paring.errors import LawError, ModelError
from paring.modifiers import Modifier, Session
from paring.modifiers.pruning.sparsegpt import SparseGPT


class _Recorder(Modifier):
    """Notes which hook was called at which step."""

    def model_post_init(self, _: object) -> None:
        object.__setattr__(self, "calls", [])

    def on_initialize(self, session: Session) -> None:
        self.calls.append(("initialize", session.step))

    def on_start(self, session: Session) -> None:
        self.calls.append(("start", session.step))

    def on_update(self, session: Session) -> None:
        self.calls.append(("update", session.step))

    def on_end(self, session: Session) -> None:
        self.calls.append(("end", session.step))

    def on_finalize(self, session: Session) -> None:
        self.calls.append(("finalize", session.step))

    def on_loss(self, session, loss, batch, outputs):
        self.calls.append(("loss", session.step))
        return loss + 1.0

    def on_gradients(self, session: Session) -> None:
        self.calls.append(("gradients", session.step))

    def on_step(self, session, optimizer) -> None:
        self.calls.append(("step", session.step))


def loop(session: Session, steps: int, optimizer=None) -> list[float]:
    optimizer = optimizer or torch.optim.SGD(session.model.parameters(), lr=0.0)
    losses = []
    for _ in range(steps):
        session.before_step()
        ids = torch.arange(8).unsqueeze(0)
        outputs = session.model(ids, labels=ids)
        loss = session.loss(outputs.loss, {"input_ids": ids, "labels": ids}, outputs)
        losses.append(float(loss.detach()) - float(outputs.loss.detach()))
        loss.backward()
        session.before_optimizer()
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(optimizer)
    return losses


def test_hooks_come_in_order_and_only_inside_the_window(pico):
    modifier = _Recorder(start=0.5, end=1.5, update_frequency=0.5)
    session = Session(pico(), [modifier])
    session.begin(steps_per_epoch=2, total_steps=5)
    extra = loop(session, 5)
    session.finish()
    inside = [("loss", 1), ("gradients", 1), ("step", 1)]
    assert modifier.calls == [
        ("initialize", 0),
        ("start", 1),
        ("update", 1),
        *inside,
        ("update", 2),
        *((name, 2) for name, _ in inside),
        ("end", 3),
        ("finalize", 5),
    ]
    assert extra == pytest.approx([0, 1, 1, 0, 0], abs=1e-5)


def test_a_modifier_without_update_frequency_has_no_updates(pico):
    class _Still(_Recorder):
        unused = frozenset({"update_frequency"})

    modifier = _Still()
    session = Session(pico(), [modifier])
    session.begin(steps_per_epoch=2, total_steps=2)
    loop(session, 2)
    assert ("step", 1) in modifier.calls
    assert "update" not in dict(modifier.calls)


@pytest.mark.parametrize(
    "window",
    [{"start": 9.0}, {"start": 1.1, "end": 1.4}, {"start": 1.0, "end": 2.5}],
    ids=["after the stage", "between two steps", "longer than the stage"],
)
def test_a_window_that_the_stage_does_not_have_is_an_error(pico, window):
    with pytest.raises(ModelError, match="the stage has 4 steps, 2 in an epoch"):
        Session(pico(), [_Recorder(**window)]).begin(2, 4)


def test_epoch_is_the_clock(pico):
    session = Session(pico(), [])
    assert session.epoch == 0.0
    session.begin(4, 8)
    loop(session, 3)
    assert (session.step, session.epoch) == (3, 0.75)


def test_labels_and_sections_of_repeated_kinds(pico):
    modifiers = [SparseGPT(sparsity=0.5), SparseGPT(sparsity=0.6)]
    session = Session(pico(), modifiers)
    assert [session.label(m) for m in modifiers] == ["SparseGPT", "SparseGPT#2"]
    session.section(modifiers[1])["x"] = 1
    assert session.report == {"SparseGPT#2": {"x": 1}}


def test_logs_are_means_since_the_last_look(pico):
    session = Session(pico(), [])
    session.log("a", 1.0)
    session.log("a", torch.tensor(3.0))
    assert session.take_logs() == {"a": 2.0}
    assert session.take_logs() == {}


def test_a_modifier_in_the_wrong_kind_of_stage_is_refused(pico):
    with pytest.raises(ModelError, match="SparseGPT can't run in a stage of kind train"):
        Session(pico(), [SparseGPT(sparsity=0.5)]).begin(1, 1)


def test_a_state_of_other_modifiers_is_refused(pico):
    state = Session(pico(), [SparseGPT(sparsity=0.5)]).state_dict()
    with pytest.raises(ModelError, match="resume with the recipe"):
        Session(pico(), []).load_state_dict(state)


def hold_half(session: Session) -> str:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = session.model.get_parameter(name)
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0
    session.masks.hold(name, mask)
    session.masks.apply(session.model)
    return name


class _FreesWeights(Modifier):
    def on_update(self, session: Session) -> None:
        for _, weight in session.weights(["up_proj"]):
            weight.add_(1.0)


class _FreesMask(Modifier):
    def on_update(self, session: Session) -> None:
        for name in list(session.masks):
            session.masks.hold(name, torch.ones_like(session.masks[name]))


class _FreesGradients(Modifier):
    def on_gradients(self, session: Session) -> None:
        for _, parameter in session.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.add_(1.0)


class _FreesMoments(Modifier):
    def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["exp_avg"].add_(1.0)


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (
            _FreesWeights(),
            r"_FreesWeights.on_update: a weight of a held zero is not zero in model.layers.0",
        ),
        (_FreesMask(), r"_FreesMask.on_update: model.layers.0.*would be freed"),
        (
            _FreesGradients(),
            r"_FreesGradients: a gradient of a held zero is not zero in model.layers.0",
        ),
        (_FreesMoments(), r"_FreesMoments: an optimizer moment of a held zero is not zero"),
    ],
)
def test_breaking_a_law_names_modifier_and_layer(pico, modifier, message):
    model = pico()
    session = Session(model, [modifier])
    hold_half(session)
    session.begin(1, 2)
    with pytest.raises(LawError, match=message):
        loop(session, 2, torch.optim.AdamW(model.parameters()))


def test_breaking_a_law_in_a_block_names_it_too(pico, calibration):
    class _FreesInBlock(Modifier):
        def on_block(self, session, block) -> None:
            for linear in block.linears(["up_proj"]).values():
                linear.weight.add_(1.0)

    session = Session(pico(), [_FreesInBlock()])
    hold_half(session)
    with pytest.raises(LawError, match=r"_FreesInBlock.on_block: a weight of a held zero"):
        session.run_oneshot(calibration)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop])
def test_held_zeros_stay_through_any_optimizer(pico, make):
    model = pico()
    session = Session(model, [])
    name = hold_half(session)
    session.begin(1, 4)
    optimizer = make(model.parameters(), lr=1e-2)
    for _ in range(4):
        loop(session, 1, optimizer)
        assert not session.masks.violations(model)
        assert not session.masks.moment_violations(model, optimizer)
    kept = session.masks[name]
    assert model.get_parameter(name)[kept].ne(0).all()


def test_random_numbers_go_on_where_they_stopped(pico):
    first = Session(pico(), [], seed=4)
    torch.randn(3, generator=first.generator)
    state = first.state_dict()
    second = Session(pico(), [], seed=4)
    second.load_state_dict(state)
    wanted = torch.randn(3, generator=first.generator)
    assert torch.equal(torch.randn(3, generator=second.generator), wanted)
    other = Session(pico(), [], seed=5)
    assert not torch.equal(torch.randn(3, generator=other.generator), wanted)


@pytest.mark.parametrize(("stop", "rest"), [(1, ["start", "update", "end"]), (3, ["end"]), (5, [])])
def test_a_resumed_session_starts_and_ends_nothing_twice(pico, stop, rest):
    def begin() -> tuple[Session, _Recorder]:
        modifier = _Recorder(start=1.0, end=2.0, update_frequency=1.0)
        session = Session(pico(), [modifier])
        session.begin(2, 6)
        return session, modifier

    first, _ = begin()
    loop(first, stop)
    second, modifier = begin()
    second.load_state_dict(first.state_dict())
    loop(second, 6 - stop)
    second.finish()
    border = [name for name, _ in modifier.calls if name in ("start", "update", "end")]
    assert border == rest
