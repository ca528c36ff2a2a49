"""What a run leaves in `output/.paring`, so that a killed run goes on where it stopped."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_model

from ..errors import ModelError, Problem, RecipeError
from ..modifiers.sizes import resize
from .durable import remove, write_text, write_whole

if TYPE_CHECKING:
    from torch import nn

FORMAT = 2
FOLDER = ".paring"
MODEL = "model.safetensors"
STATE = "state.pt"


class RunFolder:
    """`output` and its `.paring`: which stages are finished, the model after the last of them, and work in progress.

    `record` is plain JSON that the run adds its measurements to; `save` writes it.
    """

    def __init__(self, output: Path, record: dict[str, Any]) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.record = record

    @classmethod
    @contextmanager
    def open(
        cls, output: Path, recipe: str, inputs: str, fresh: bool = False
    ) -> Iterator[RunFolder]:
        """Start or continue the run of `recipe` (resolved YAML) on what has the fingerprint `inputs`.

        Raises RecipeError when `output` holds something else (another run, unless `fresh`, or a user's files), or when
        another process is at work there.
        """
        place = output.absolute()
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.parent / f".{place.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(output, "another process is at work here; wait for it") from None
            try:
                yield cls._open(output, recipe, inputs, fresh)
            finally:
                Path(lock.name).unlink()

    @classmethod
    def _open(cls, output: Path, recipe: str, inputs: str, fresh: bool) -> RunFolder:
        file = output / FOLDER / "run.json"
        record = json.loads(file.read_text()) if file.is_file() else None
        if record is None and output.exists() and any(p.name != FOLDER for p in output.iterdir()):
            raise _refusal(
                output, "is not empty and no run of `recipe apply`; name another --output"
            )
        fingerprint = hashlib.sha256(f"{FORMAT}\n{inputs}\n{recipe}".encode()).hexdigest()
        if record is not None and record["fingerprint"] != fingerprint and not fresh:
            fresh = _is_empty(output / FOLDER, record)
            if not fresh:
                change = _difference(record["recipe"], recipe)
                raise _refusal(
                    output,
                    f"holds the run of another recipe, model or data{change}\n"
                    "name another --output, or start over here with --fresh",
                )
        if record is None or fresh:
            published = record["published"] if record else []
            remove(output / FOLDER)
            record = {"fingerprint": fingerprint, "recipe": recipe, "published": published}
            record.update(done=False, evaluated=False, stages=[], before={})
            (output / FOLDER).mkdir(parents=True)
            write_text(file, json.dumps(record, indent=2) + "\n")
        return cls(output, record)

    @classmethod
    def follow(cls, output: Path) -> RunFolder:
        """The run that another process has opened there, to be read alone."""
        folder = cls(output, {})
        folder.reload()
        return folder

    def reload(self) -> None:
        """Take over what the process that writes has noted."""
        self.record.update(json.loads((self.folder / "run.json").read_text()))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What each finished stage did."""
        found: list[dict[str, Any]] = self.record["stages"]
        return found

    def is_done(self, evaluated: bool) -> bool:
        """Whether the result is published, with its measurements if they are asked for."""
        return bool(self.record["done"]) and bool(self.record["evaluated"] or not evaluated)

    def save(self) -> None:
        write_text(self.folder / "run.json", json.dumps(self.record, indent=2) + "\n")

    def work(self, name: str) -> Path:
        """A folder for work in progress: finished blocks, Trainer checkpoints."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def empty_work(self, name: str) -> Path:
        """As `work`, without what a killed run left there."""
        remove(self.folder / name)
        return self.work(name)

    def finish_stage(self, entry: dict[str, Any], model: nn.Module, state: dict[str, Any]) -> None:
        """Keep the model, its `state` and the stage's report `entry`; what led there is deleted."""
        folder = self.work(f"after-{len(self.stages)}")
        write_whole(folder / MODEL, lambda file: save_model(model, str(file)))
        write_whole(folder / STATE, lambda file: torch.save(state, file))
        self.stages.append(entry)
        self.save()
        for path in self.folder.iterdir():
            if path.is_dir() and path != folder:
                remove(path)

    def load_stage(self, model: nn.Module) -> dict[str, Any] | None:
        """Put the weights after the last finished stage into `model`, and return the state kept with them.

        The model becomes as small as it was then: the state knows its `sizes`.
        """
        if not self.stages:
            return None
        folder = self.folder / f"after-{len(self.stages) - 1}"
        state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
        resize(model, state["sizes"])
        _fill(model, folder / MODEL)
        return state

    @contextmanager
    def set_aside(self, model: nn.Module) -> Iterator[None]:
        """Give the memory of the model's parameters back meanwhile: they are kept here since the last stage."""
        if not self.stages:
            yield
            return
        shapes = [(parameter, parameter.shape) for parameter in model.parameters()]
        for parameter, _ in shapes:
            parameter.data = parameter.data.new_empty(0)
        try:
            yield
        finally:
            for parameter, shape in shapes:
                parameter.data = parameter.data.new_empty(shape)
            _fill(model, self.folder / f"after-{len(self.stages) - 1}" / MODEL)

    def announce(self, names: list[str]) -> None:
        """Note, before they are moved, which names the run is about to publish in `output`."""
        self.record["published"] = sorted({*self.record["published"], *names})
        self.save()

    def finish(self, evaluated: bool) -> None:
        """Everything is in `output`: keep the record and, if there is more to measure, the last model."""
        self.record.update(done=True, evaluated=evaluated)
        self.save()
        for path in self.folder.iterdir():
            if path.is_dir() and (evaluated or not path.name.startswith("after-")):
                remove(path)


@torch.no_grad()
def _fill(model: nn.Module, file: Path) -> None:
    """Put the tensors of `file`, which `save_model` wrote, into `model`, one at a time.

    The file is opened for each: whatever is read through one opening stays in memory until it is closed.
    """
    own = model.state_dict()
    with safe_open(file, "pt") as stored:
        names, tied = list(stored.keys()), stored.metadata() or {}
    foreign = own.keys() ^ {*names, *tied}
    for name in names if not foreign else ():
        with safe_open(file, "pt") as stored:
            values = stored.get_tensor(name)
            if values.shape == own[name].shape:
                own[name].copy_(values)
            else:
                foreign.add(name)
    if foreign:
        raise ModelError(f"{file}: {min(foreign)} is not as in the model; start over with --fresh")


def _is_empty(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a run was refused or stopped before it had done anything that another one would destroy."""
    work = (path for path in folder.iterdir() if path.is_dir())
    return (
        not record["stages"] and not record["published"] and not any(any(p.iterdir()) for p in work)
    )


def _difference(old: str, new: str) -> str:
    """The first changed lines of the recipe, to show which run the folder holds."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "".join(f"\n  {line}" for line in changed[:6])


def _refusal(output: Path, message: str) -> RecipeError:
    return RecipeError([Problem(str(output), 0, 0, message)])
