"""The journal of a one-shot run: what is finished, so that a killed run goes on from its last finished block.

A folder with `journal.json` (the run's fingerprint and the entries in order) and one file per entry: the weights of the
finished block (or of the whole model, with its sizes) and the session's state. An entry exists once the journal names
it; every file is written under a temporary name, fsynced and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ..errors import DataError
from .blocks import find_blocks
from .sizes import resize, sizes

if TYPE_CHECKING:
    from .blocks import Block
    from .session import Session

VERSION = 3


class Journal:
    """Opens or starts the journal in `folder`. Raises DataError when it belongs to another run."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.entries: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "journal.json"
        if file.exists():
            try:
                saved = json.loads(file.read_text())
                if saved["version"] != VERSION or saved["fingerprint"] != fingerprint:
                    raise DataError(
                        f"{folder}: holds an unfinished run with another recipe, model, data or seed; delete the"
                        " folder to start over, or go on with what that run was started with"
                    )
                self.entries = saved["entries"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}: damaged ({error}); delete the folder to start over"
                ) from error

    def save(self, session: Session, walk: int, block: Block | None) -> None:
        """Record that a walk's block (or, with None, the whole-model walk) is finished."""
        module = session.model if block is None else block.module
        index = None if block is None else block.index
        name = f"walk{walk}-model" if block is None else f"walk{walk}-block{index}"
        _write(self.folder / f"{name}.weights", lambda file: torch.save(module.state_dict(), file))
        _write(self.folder / f"{name}.state", lambda file: torch.save(session.state_dict(), file))
        entry: dict[str, Any] = {"name": name, "walk": walk, "block": index}
        if block is None:  # it may have made the model smaller
            entry["sizes"] = sizes(session.model)
        self.entries.append(entry)
        record = {"version": VERSION, "fingerprint": self.fingerprint, "entries": self.entries}
        _write(self.folder / "journal.json", lambda file: file.write(json.dumps(record).encode()))
        finished = [entry["name"] for entry in self.entries if entry["walk"] < walk]
        for entry in self.entries[:-1]:
            if entry["name"] not in finished[-1:]:  # the state at the end of the walk before
                (self.folder / f"{entry['name']}.state").unlink(missing_ok=True)

    def restore_walks(self, session: Session) -> tuple[int, int]:
        """Bring model and session to the end of the last finished walk; returns the walk and block to go on with.

        The finished blocks of an unfinished walk are for `restore_blocks`: until then, one can still see the model as
        it was when that walk began.
        """
        if not self.entries:
            return 0, 0
        last = self.entries[-1]
        total = 0 if last["block"] is None else len(find_blocks(session.model))
        if last["block"] is None or last["block"] + 1 == total:
            position = last["walk"] + 1, 0
        else:
            position = last["walk"], last["block"] + 1
        self._restore(session, [e for e in self.entries if e["walk"] < position[0]])
        return position

    def restore_blocks(self, session: Session) -> None:
        """Bring model and session to the last finished block of the unfinished walk."""
        walk = self.entries[-1]["walk"]
        self._restore(session, [entry for entry in self.entries if entry["walk"] == walk])

    def _restore(self, session: Session, entries: list[dict[str, Any]]) -> None:
        if not entries:
            return
        blocks = {}
        if any(entry["block"] is not None for entry in entries):
            blocks = dict(enumerate(module for _, module in find_blocks(session.model)))
        for entry in entries:
            module = session.model if entry["block"] is None else blocks[entry["block"]]
            if entry["block"] is None:
                resize(session.model, entry["sizes"])
            module.load_state_dict(self._read(f"{entry['name']}.weights", session.device))
        session.load_state_dict(self._read(f"{entries[-1]['name']}.state", torch.device("cpu")))
        session.to(session.device)

    def _read(self, name: str, device: torch.device) -> Any:
        file = self.folder / name
        try:
            return torch.load(file, weights_only=True, map_location=device)
        except Exception as error:
            raise DataError(
                f"{file}: damaged ({error}); delete {self.folder} to start over"
            ) from error


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
