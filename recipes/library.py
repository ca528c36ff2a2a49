"""The recipes that come with Paring, found by name. Free of torch, so that listing them is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, RecipeError
from .suggest import did_you_mean

FOLDER = Path(__file__).parent / "library"


@dataclass(frozen=True)
class Entry:
    """A recipe of the library: its name, its file, and the comment that opens the file."""

    name: str
    path: Path
    header: str

    @property
    def summary(self) -> str:
        """The first line of the header."""
        return self.header.split("\n", 1)[0]


def entries() -> list[Entry]:
    """Every recipe of the library, by name."""
    found = []
    for path in sorted(FOLDER.rglob("*.yaml"), key=lambda path: path.stem):
        lines = path.read_text(encoding="utf-8").splitlines()
        count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
        header = "\n".join(line[1:].removeprefix(" ") for line in lines[:count])
        found.append(Entry(path.stem, path, header))
    return found


def find(name: str) -> Entry:
    """The entry of that name.

    Raises RecipeError.
    """
    known = {entry.name: entry for entry in entries()}
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, otherwise="`recipe list` shows the library")
    message = f"no such file, and no recipe of that name in the library; {hint}"
    raise RecipeError([Problem(name, 0, 0, message)])


def read_recipe(path_or_name: str | Path) -> tuple[str, str]:
    """Text of a recipe file or of a library recipe, and the source to name in messages.

    Raises RecipeError.
    """
    path = Path(path_or_name)
    if not path.exists():
        path = find(str(path_or_name)).path
    try:
        return path.read_text(encoding="utf-8-sig"), str(path)
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise RecipeError([Problem(str(path), 0, 0, message)]) from None
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise RecipeError([Problem(str(path), 0, 0, f"can't be read: {reason}")]) from None
