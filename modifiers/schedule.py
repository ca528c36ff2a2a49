"""One clock, the optimizer step: epochs become steps once, exactly; and how a value goes on its way.

An epoch is a decimal number from a recipe, so it is taken as the decimal the user wrote (0.3 is 3/10, not the nearest
binary fraction) and multiplied by the steps per epoch in whole-number arithmetic. A step is the first one at or after
the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

Unit = Literal["epochs", "steps"]
"""What times are counted in: epochs of the stage, or its optimizer steps."""
Scheduler = Literal["cubic", "linear", "cosine", "polynomial"]
"""A recipe's names of the ramps."""


def to_step(epoch: float, steps_per_epoch: int) -> int:
    """The first optimizer step at or after an epoch: step s is at epoch s / steps_per_epoch."""
    return math.ceil(Fraction(repr(float(epoch))) * steps_per_epoch)


def per_unit(unit: Unit, steps_per_epoch: int) -> int:
    """How many optimizer steps one unit of time has; with it, `to_step` takes either unit."""
    return steps_per_epoch if unit == "epochs" else 1


@dataclass(frozen=True)
class Window:
    """When a modifier acts: optimizer steps [start, end), and the steps at which it updates."""

    start: int
    end: int
    updates: frozenset[int]

    @classmethod
    def compile(
        cls,
        start: float,
        end: float | None,
        update_frequency: float | None,
        steps_per_epoch: int,
        total_steps: int,
    ) -> Window:
        """Turn epochs into steps. `end` None is the end of the stage; `update_frequency` None is every step.

        Times in steps compile with one step per epoch.
        """
        first = to_step(start, steps_per_epoch)
        last = total_steps if end is None else to_step(end, steps_per_epoch)
        if update_frequency is None:
            return cls(first, last, frozenset(range(first, last)))
        begin = Fraction(repr(float(start)))
        every = Fraction(repr(float(update_frequency)))
        count = max(0, math.ceil((Fraction(last, steps_per_epoch) - begin) / every))
        steps = (math.ceil((begin + k * every) * steps_per_epoch) for k in range(count))
        return cls(first, last, frozenset(step for step in steps if step < last))

    def contains(self, step: int) -> bool:
        return self.start <= step < self.end

    def progress(self, step: int) -> float:
        """How far through the window a step is: 0 at `start`, 1 at `end` and after."""
        if step >= self.end:
            return 1.0
        return max(0.0, (step - self.start) / (self.end - self.start))


def linear(progress: float) -> float:
    return progress


def cubic(progress: float) -> float:
    """Zhu & Gupta 2017 (arXiv 1710.01878), equation 1: fast at first, slow towards the end."""
    return 1.0 + (progress - 1.0) ** 3


def cosine(progress: float) -> float:
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def polynomial(progress: float, power: float) -> float:
    """1 - (1 - p)^power: power 1 is linear, 3 cubic; the higher, the faster at first."""
    return 1.0 - math.pow(1.0 - progress, power)


RAMPS: dict[str, Callable[[float], float]] = {"linear": linear, "cubic": cubic, "cosine": cosine}


def ramp(kind: Scheduler, first: float, last: float, progress: float, power: float = 3.0) -> float:
    """The value at `progress` in [0, 1] on the way from `first` to `last`; exactly `last` at 1.

    `power` is the polynomial's; the other kinds have none.
    """
    if progress >= 1.0:
        return last
    done = polynomial(progress, power) if kind == "polynomial" else RAMPS[kind](progress)
    return first + (last - first) * done


def _in_order(milestones: dict[float, float]) -> dict[float, float]:
    return dict(sorted(milestones.items()))


Milestones = Annotated[
    dict[Annotated[float, Field(ge=0)], float], Field(min_length=1), AfterValidator(_in_order)
]
"""The type of a recipe's `milestones`: time -> the value from then on, sorted by time."""


def stepped(
    first: float, milestones: dict[float, float], reached: Callable[[float], bool]
) -> float:
    """Multi-step: `first`, then the value of the last milestone that the clock has reached."""
    value = first
    for time, due in milestones.items():
        if not reached(time):
            break
        value = due
    return value
