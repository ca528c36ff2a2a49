"""What commands print with: results on stdout, errors and progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from ..progress import Progress

# Without emoji: a path or a note may hold `:100:`.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` to hand to long work: bars on a terminal, plain lines elsewhere (on stderr)."""
    if not errors.is_terminal:
        yield Lines(errors)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=errors) as drawing:
        yield Bars(drawing)


class Bars:
    """One bar for each label, in the order of their first call."""

    def __init__(self, drawing: RichProgress) -> None:
        self.drawing = drawing
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        if label not in self.tasks:
            self.tasks[label] = self.drawing.add_task(label, note="")
        self.drawing.update(self.tasks[label], completed=done, total=total, note=note)


class Lines:
    """A line when a label begins, when it is done, and at most every `seconds` between."""

    def __init__(self, out: Console, seconds: float = 5.0) -> None:
        self.out = out
        self.seconds = seconds
        self.printed: dict[str, tuple[float, int]] = {}

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if label in self.printed:
            last, so_far = self.printed[label]
            if done == so_far or (done < total and now - last < self.seconds):
                return
        self.printed[label] = (now, done)
        line = f"{label}: {done}/{total} {note}".rstrip()
        self.out.print(line, markup=False, highlight=False, soft_wrap=True)
