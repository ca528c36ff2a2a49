"""The cache folder, and how files get into it whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20  # bytes read at a time


def cache_dir() -> Path:
    """`$PARING_CACHE`, else `paring` in the platform's cache folder. It need not exist yet."""
    if os.environ.get("PARING_CACHE"):
        return Path(os.environ["PARING_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "paring"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paring"


@contextmanager
def transaction(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that becomes `final` if the body succeeds.

    Its files reach the disk before it gets its name, so a folder called `final` is always whole. If
    the body fails, nothing remains; if it is killed, a folder `.<name>.*.partial` does, which the
    next holder of `lock(final)` removes. If another process has made `final` meanwhile, that stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        folder.chmod(0o777 & ~_umask())
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        _sync(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock(final: Path) -> Iterator[None]:
    """Hold the right to make `final`; other processes wait. Removes what killed makers left."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / f".{final.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in final.parent.glob(f".{final.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Hex digest of all that is in a file; training may change a few weights in its middle alone."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
