"""Laws that hold for every registered modifier; a new one is under them as soon as its file exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paring.modifiers import Modifier, Session, registry

ALL = sorted(set(registry().values()), key=lambda cls: cls.key())
ONESHOT = [
    cls
    for cls in ALL
    if "oneshot" in cls.stages
    and (cls.on_block is not Modifier.on_block or cls.on_update is not Modifier.on_update)
]
TRAIN = [cls for cls in ALL if "train" in cls.stages]
CANDIDATES: dict[str, Any] = {"sparsity": 0.6, "teacher": "dense", "init_lr": 3e-3}
OWN: dict[str, dict[str, Any]] = {
    "AWQ": {"group_size": 16},
    "HeadGPTQ": {"group_size": 16},
    "TaskLoss": {"weight": 0.5},
}
UP = "model.layers.0.mlp.up_proj.weight"


def make(cls: type[Modifier], **window: float) -> Modifier:
    """A modifier with the settings it needs."""
    fields = {key: value for key, value in CANDIDATES.items() if key in cls.model_fields}
    fields |= OWN.get(cls.key(), {})
    return cls(**fields, **window)


def prune_some(session: Session) -> None:
    """Hold some zeros, as an earlier stage would have."""
    for name, weight in session.weights(["Linear"], ["lm_head"]):
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) > 0.3
        weight.masked_fill_(~mask, 0)
        session.masks.hold(name, mask)


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train_step(session: Session, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step of two micro-batches; returns what the modifiers added to the loss."""
    added = 0.0
    session.before_step()
    for micro in range(2):
        data = batch(10 * session.step + micro)
        outputs = session.model(**data)
        loss = session.loss(outputs.loss, data, outputs)
        added += abs(float(loss.detach()) - float(outputs.loss.detach()))
        (loss / 2).backward()
    session.before_optimizer(optimizer)
    assert not session.masks.gradient_violations(session.model)
    optimizer.step()
    session.after_step(optimizer)
    optimizer.zero_grad()
    return added


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_every_modifier_runs_somewhere():
    assert ALL
    assert set(ONESHOT) | set(TRAIN) == set(ALL)


@pytest.mark.parametrize("cls", ONESHOT)
def test_oneshot_keeps_held_zeros_and_quantized_zeros(pico, calibration, cls):
    model = pico()
    session = Session(model, [make(cls)])
    prune_some(session)
    before = dict(session.masks.items())
    session.run_oneshot(calibration)
    assert set(session.masks) >= set(before)
    for name, mask in before.items():
        if mask.shape != model.get_parameter(name).shape:  # rows or columns were removed
            mask = session.masks[name]
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert not (session.masks[name] & ~mask).any()
        layer = session.quantization.get(name.removesuffix(".weight"))
        if layer is not None:
            assert (layer.quantized_weight[~mask] == 0).all()


@pytest.mark.parametrize("cls", ONESHOT)
def test_oneshot_with_the_same_seed_gives_the_same_bytes(pico, calibration, cls):
    results = []
    for _ in range(2):
        model = pico()
        Session(model, [make(cls)], seed=3).run_oneshot(calibration)
        results.append(bytes_of(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("cls", [cls for cls in ONESHOT if cls.preserves_function])
def test_what_preserves_the_function_does(pico, calibration, cls):
    model = pico()
    with torch.no_grad():
        before = model(calibration).logits
        Session(model, [make(cls)]).run_oneshot(calibration)
        assert torch.allclose(model(calibration).logits, before, atol=1e-5)


@pytest.mark.parametrize("cls", [cls for cls in ONESHOT if cls.on_block is not Modifier.on_block])
def test_a_killed_oneshot_run_resumed_equals_an_uninterrupted_one(pico, calibration, cls, tmp_path):
    whole = pico(layers=3)
    Session(whole, [make(cls)]).run_oneshot(calibration)

    def kill(label: str, done: int, total: int, note: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Session(pico(layers=3), [make(cls)]).run_oneshot(calibration, kill, tmp_path)
    resumed = pico(layers=3)
    Session(resumed, [make(cls)]).run_oneshot(calibration, None, tmp_path)
    assert bytes_of(resumed) == bytes_of(whole)


@pytest.mark.parametrize("cls", TRAIN)
def test_training_keeps_held_zeros_at_every_step(pico, cls):
    model = pico()
    session = Session(model, [make(cls)], load_teacher=lambda _: pico(1))
    prune_some(session)
    session.begin(2, 6)
    optimizer = adam(model)
    sizes = []
    for _ in range(6):
        train_step(session, optimizer)
        assert not session.masks.violations(model)
        assert not session.masks.moment_violations(model, optimizer)
        sizes.append(sum(int(mask.sum()) for _, mask in session.masks.items()))
    session.finish()
    assert not session.masks.violations(model)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("cls", TRAIN)
def test_outside_its_window_a_modifier_is_inert(pico, cls):
    plain = pico()
    nothing = Session(plain, [])
    nothing.begin(2, 8)
    model = pico()
    session = Session(model, [make(cls, start=1.0, end=2.0)], load_teacher=lambda _: pico(1))
    session.begin(2, 8)
    optimizers = adam(plain), adam(model)
    for step in range(8):
        train_step(nothing, optimizers[0])
        added = train_step(session, optimizers[1])
        if step < 2:
            assert bytes_of(model) == bytes_of(plain)
        if not 2 <= step < 4:
            assert added == 0.0
    masks = {name: mask.clone() for name, mask in session.masks.items()}
    session.finish()
    assert all(torch.equal(session.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("cls", TRAIN)
def test_training_resumed_equals_training_uninterrupted(pico, cls, stop, tmp_path):
    def start():
        model = pico()
        modifier = make(cls, start=0.5, end=2.5, update_frequency=0.5)
        session = Session(model, [modifier], seed=7, load_teacher=lambda _: pico(1))
        return model, session, adam(model)

    whole, session, optimizer = start()
    prune_some(session)
    session.begin(2, 6)
    for step in range(6):
        if step == stop:
            saved = (whole.state_dict(), optimizer.state_dict(), session.state_dict())
            torch.save(saved, tmp_path / "checkpoint")
        train_step(session, optimizer)
    session.finish()

    model, resumed, optimizer = start()
    weights, moments, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    resumed.begin(2, 6)
    resumed.load_state_dict(state)
    assert resumed.step == stop
    for _ in range(stop, 6):
        train_step(resumed, optimizer)
    resumed.finish()
    assert bytes_of(model) == bytes_of(whole)
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in session.masks.items())


@pytest.mark.parametrize("cls", ALL)
def test_a_modifier_documents_itself(cls):
    assert cls.__doc__
    schema = cls.model_json_schema()
    assert all(field.get("description") for field in schema["properties"].values()), cls
