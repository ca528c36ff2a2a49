"""Files that survive a crash: whole or absent, and on the disk before their name says so."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException | None) -> str:
    """The system's words where a file found no room, as Python, safetensors or torch passed them on; else "".

    torch.save tells that writing failed, and not why.
    """
    while error is not None:
        for code in NO_ROOM:
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                return os.strerror(code)
        if "inline_container.cc" in str(error) and "Reader" not in str(error):
            return "a file could not be written"
        error = error.__context__
    return ""


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, flush it and give it the name `file`."""
    partial = file.with_name(f".{file.name}.partial")
    write(partial)
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def remove(path: Path) -> None:
    """Delete a file or a whole folder; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
