from __future__ import annotations

import json

import pytest
import torch

from paring.errors import DataError
from paring.modifiers import Session, registry

R = registry()


class Killed(Exception):
    pass


def modifiers():
    return [
        R["SmoothQuant"](),
        R["SparseGPT"](sparsity=0.5),
        R["Quantization"](dynamic=False, skip={"by": "input_range", "top": 3}),
        R["HeadGPTQ"](group_size=16),
    ]


def run(pico, calibration, folder=None, kill_at=None):
    """Run the stage on a fresh model; kill it after `kill_at` finished blocks, over all passes."""
    model = pico(layers=3)
    session = Session(model, modifiers(), seed=5)
    finished = []

    def progress(label: str, done: int, total: int, note: str = "") -> None:
        if note or done:
            finished.append((label, done))
        if kill_at is not None and len(finished) > kill_at:
            raise Killed

    session.run_oneshot(calibration, progress, folder)
    return model, session


def same(first, second) -> None:
    model, session = first
    other, resumed = second
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert set(session.masks) == set(resumed.masks)
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in session.masks.items())
    assert session.quantization.keys() == resumed.quantization.keys()
    for name, layer in session.quantization.items():
        mine, theirs = layer.state_dict(), resumed.quantization[name].state_dict()
        for key, value in mine.items():
            equal = (
                torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key]
            )
            assert equal, (name, key)
    assert json.dumps(session.report) == json.dumps(resumed.report)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():  # the hooks are back too
        assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("kill_at", [0, 1, 2, 4, 5, 8, 12, 14, 15])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(pico, calibration, tmp_path, kill_at):
    with pytest.raises(Killed):
        run(pico, calibration, tmp_path, kill_at)
    same(run(pico, calibration), run(pico, calibration, tmp_path))


def test_finished_blocks_are_not_done_again(pico, calibration, tmp_path):
    run(pico, calibration, tmp_path)
    steps = []
    model = pico(layers=3)
    session = Session(model, modifiers(), seed=5)
    session.run_oneshot(calibration, lambda *args: steps.append(args), tmp_path)
    assert steps == []
    same(run(pico, calibration), (model, session))


def test_another_run_is_refused(pico, calibration, tmp_path):
    with pytest.raises(Killed):
        run(pico, calibration, tmp_path, 2)
    with pytest.raises(DataError, match="another recipe, model, data or seed"):
        run(pico, calibration.flip(0), tmp_path)
    with pytest.raises(DataError, match="another recipe, model, data or seed"):
        Session(pico(layers=3), [R["SparseGPT"](sparsity=0.5)], seed=5).run_oneshot(
            calibration, None, tmp_path
        )


@pytest.mark.parametrize("name", ["journal.json", "walk0-block0.weights", "walk0-block0.state"])
def test_a_damaged_journal_is_an_error_not_a_wrong_result(pico, calibration, tmp_path, name):
    with pytest.raises(Killed):
        run(pico, calibration, tmp_path, 1)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        run(pico, calibration, tmp_path)


def test_no_temporary_files_are_left(pico, calibration, tmp_path):
    run(pico, calibration, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    left = sorted(file.name for file in tmp_path.glob("*.state"))
    assert left == ["walk2-block2.state", "walk3-model.state"]  # the last of each walk needed
