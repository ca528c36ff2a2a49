"""The errors Paring raises on bad input. Each message says where, what is wrong, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


class ParingError(Exception):
    """Base of every error that a user's input can cause; the command line prints it and exits 2."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, with its place (1-based line and column; 0 where there is none)."""

    source: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return f"{place}: {self.message}"


class RecipeError(ParingError):
    """A recipe is wrong. Holds every mistake found, in file order."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class TargetError(ParingError):
    """A target or ignore pattern matches nothing in the model."""


class ModelError(ParingError):
    """A model can't be found, read, or has a structure that an algorithm does not know."""


class DataError(ParingError):
    """A data set can't be found or read, or is too small for what was asked."""


class GraphError(ParingError):
    """A graph file is damaged, of another version, or can't run on this machine."""


class ZooError(ParingError):
    """A stub names no card, or a download failed or is not what its card promises."""


class LawError(ParingError):
    """A law of the modifiers was broken (see docs/architecture.md); always a bug of a modifier."""
