"""What acts when: a recipe laid out in time, for the terminal and for pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from ..modifiers.base import Modifier
from ..modifiers.oneshot import plan as plan_walks
from ..modifiers.schedule import Unit
from ..modifiers.session import Session
from .dump import given_fields
from .schema import DataConfig, Recipe, Stage, TrainingConfig

POINTS = 400  # of a curve that has no steps of its own


@dataclass(frozen=True)
class Row:
    """One modifier of a stage. Times are epochs of the stage; one-shot stages have none (0 to 0)."""

    name: str
    family: str
    settings: str
    start: float = 0.0
    end: float = 0.0
    every: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    """(epoch, value) wherever it changes, for modifiers that schedule a sparsity or a learning rate."""
    unit: Unit = "epochs"
    """Of `every` and `window`; `start`, `end` and `curve` are in epochs whatever the unit."""
    window: tuple[float, float | None] | None = None
    """[start, end) in steps, where the unit is steps; None: the stage's end."""
    lasting: bool = True
    """Whether the curve's last value holds after `end`, as a sparsity does."""

    @property
    def pace(self) -> str:
        """`every step`, or `0.05 to 0.6 every 0.1 epochs`."""
        pace = "every step" if self.every is None else f"every {self.every:g} {self.unit}"
        if self.window is not None:
            first, last = self.window
            until = f"to {last:g}" if last is not None else "on"
            pace = f"{pace} from step {first:g} {until}"
        if self.curve:
            pace = f"{self.curve[0][1]:g} to {self.curve[-1][1]:g} {pace}"
        return pace


@dataclass(frozen=True)
class Walk:
    """A step of a one-shot stage: what happens, and which modifiers do it, in order."""

    what: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class StagePlan:
    """A stage: one-shot stages have `walks`, training stages `epochs` and `rows`."""

    name: str
    run: str
    about: str
    walks: tuple[Walk, ...] = ()
    rows: tuple[Row, ...] = ()
    epochs: float = 0.0

    @property
    def ticks(self) -> list[float]:
        """Round epochs to mark on the axis: at most seven, steps of 1, 2 or 5 times a power of ten."""
        powers = (10.0**n for n in range(-6, 12))
        step = next(s for p in powers for s in (p, 2 * p, 5 * p) if self.epochs / s <= 6)
        return [k * step for k in range(int(self.epochs / step * (1 + 1e-9)) + 1)]


@dataclass(frozen=True)
class Plan:
    """A whole recipe in time."""

    title: str
    stages: tuple[StagePlan, ...]
    after: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, title: str = "", per_epoch: float | None = None) -> Plan:
        """Lay out a recipe. `title` names it; the model is added. per_epoch: optimizer steps, where a run has told."""
        parts = [part for part in (title, recipe.model) if part]
        after = []
        if recipe.evaluate is not None:
            after.append(f"perplexity before and after on {_data(recipe.evaluate)}")
        after.append(f"logits matrix: {recipe.export.head}")
        stages = tuple(_stage(stage, per_epoch) for stage in recipe.stages)
        return cls(" · ".join(parts), stages, tuple(after))


_WALKS = {
    "model": "the whole model at once",
    "observe": "look at every block",
    "blocks": "block by block",
}


def _stage(stage: Stage, per_epoch: float | None) -> StagePlan:
    data = [_data(stage.data)] if stage.data else ["no data"]
    if stage.training is None:
        walks = [
            Walk(
                _WALKS[walk.kind],
                tuple(Row(m.key(), _family(m), _settings(m)) for m in walk.modifiers),
            )
            for walk in plan_walks(stage.modifiers)
        ]
        return StagePlan(stage.name, stage.run, data[0], walks=tuple(walks))
    training = stage.training
    about = " · ".join([_training(training), *data])
    per_epoch = per_epoch or _steps_per_epoch(stage, training)
    epochs = training.epochs
    if per_epoch and training.max_steps:
        epochs = min(epochs, training.max_steps / per_epoch)
    rows = tuple(_train_row(modifier, training, epochs, per_epoch) for modifier in stage.modifiers)
    return StagePlan(stage.name, stage.run, about, rows=rows, epochs=epochs)


def _train_row(
    modifier: Modifier, training: TrainingConfig, epochs: float, per_epoch: float | None
) -> Row:
    """epochs: how many the stage has; per_epoch: optimizer steps, None where nobody knows yet."""
    steps = modifier.unit == "steps"
    length, per_unit = epochs, 1.0
    if steps:
        length = round(epochs * per_epoch) if per_epoch else training.max_steps or math.inf
        per_unit = epochs / length
    first, last = modifier.start, length if modifier.end is None else modifier.end
    if steps and (math.isinf(length) or last > length):
        # Nobody knows yet where on the axis its steps are: it is told in words, and drawn over the whole stage.
        first, last, per_unit = 0.0, epochs, 1.0
        curve: tuple[tuple[float, float], ...] = ()
    else:
        curve = _curve(modifier, first, last)
    return Row(
        modifier.key(),
        _family(modifier),
        _settings(modifier),
        first * per_unit,
        last * per_unit,
        modifier.update_frequency,
        tuple((time * per_unit, value) for time, value in curve),
        modifier.unit,
        (modifier.start, modifier.end) if steps else None,
        hasattr(modifier, "scheduled_sparsity"),
    )


def _steps_per_epoch(stage: Stage, training: TrainingConfig) -> int | None:
    """As far as a recipe tells: by `samples`, if there are so many."""
    if stage.data is None or not stage.data.samples:
        return None
    batches = math.ceil(stage.data.samples / training.batch_size)
    return math.ceil(batches / training.gradient_accumulation)


@dataclass(frozen=True)
class _Clock:
    """As much of a session as a schedule asks for: where in its window a modifier is, in the modifier's unit."""

    now: float
    start: float
    end: float
    run: str = "train"

    def progress(self, modifier: Modifier) -> float:
        return min((self.now - self.start) / (self.end - self.start), 1.0)

    def reached(self, modifier: Modifier, time: float) -> bool:
        return self.now >= time * (1 - 1e-12)


def _curve(modifier: Modifier, start: float, end: float) -> tuple[tuple[float, float], ...]:
    schedule = getattr(modifier, "scheduled_sparsity", getattr(modifier, "scheduled_rate", None))
    if schedule is None:
        return ()
    every = modifier.update_frequency
    step = (end - start) / POINTS if every is None else every
    count = int((end - start) / step * (1 + 1e-9))
    times = {min(start + k * step, end) for k in range(count + 1)} | {end}
    if every is None:
        milestones = getattr(modifier, "milestones", None) or {}
        times |= {time for time in milestones if start <= time <= end}
    return tuple(
        (now, float(schedule(cast("Session", _Clock(now, start, end))))) for now in sorted(times)
    )


def _family(modifier: Modifier) -> str:
    """The folder of `modifiers/` its class stands in; `custom` for others'."""
    own, parts = Modifier.__module__.rpartition(".")[0], type(modifier).__module__
    return parts.removeprefix(f"{own}.").partition(".")[0] if parts.startswith(own) else "custom"


def _data(data: DataConfig) -> str:
    split = "" if data.split == "train" else f" {data.split}"
    count = data.samples or data.windows
    if all(part.has_answers for part in data.parts) and not data.packing:
        size = f"{count or 'all'} answers, up to {data.length} tokens"
    else:
        size = f"{count} x {data.length} tokens" if count else f"windows of {data.length} tokens"
    return f"{data.source}{split}, {size}"


def _training(training: TrainingConfig) -> str:
    epochs = f"{training.epochs:g} epoch{'s'[: training.epochs != 1]}"
    limit = f", at most {training.max_steps} steps" if training.max_steps else ""
    batch = f"batch {training.batch_size}"
    if training.gradient_accumulation > 1:
        batch += f" x {training.gradient_accumulation}"
    rate = f"learning rate {training.learning_rate:g} {training.lr_scheduler}"
    return f"{epochs}{limit} · {batch} · {rate}"


def _settings(modifier: Modifier) -> str:
    """What the recipe gives a modifier, besides its times: `sparsity 0.5 · ignore lm_head`."""
    given = given_fields(modifier)
    timing = Modifier.timing
    return " · ".join(f"{k} {_shown(v)}" for k, v in given.items() if k not in timing)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "nothing"
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
