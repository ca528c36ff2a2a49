"""Files that commands write: what can be told before the work."""

from __future__ import annotations

from pathlib import Path

from ..errors import Problem, RecipeError


def check_folder(file: Path, option: str) -> None:
    """Raises RecipeError if there is no folder for `file`; `option` is what the user gave it as."""
    if not file.parent.is_dir():
        message = f"no folder {file.parent}; make it first"
        raise RecipeError([Problem(option, 0, 0, message)])
