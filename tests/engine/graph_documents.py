"""Opening a graph folder by hand: its JSON, its tensors, and its checksums made right again."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file


class Folder:
    """A graph folder whose parts can be changed and put back, checksums included, as a hostile author would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._json = (path / "graph.json").read_bytes()
        self._tensors = (path / "graph.safetensors").read_bytes()

    def document(self) -> dict[str, Any]:
        return copy.deepcopy(json.loads(self._json))

    # Both are what the folder held at first, whatever was written since.
    def arrays(self) -> dict[str, np.ndarray]:
        return load(self._tensors)

    def restore(self) -> None:
        self.write_bytes(self._json, self._tensors)

    def write_bytes(self, graph: bytes | None = None, tensors: bytes | None = None) -> None:
        (self.path / "graph.json").write_bytes(self._json if graph is None else graph)
        (self.path / "graph.safetensors").write_bytes(self._tensors if tensors is None else tensors)

    def write(self, document: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
        """Write both; sizes, part hashes and the checksum follow from them."""
        tensors = self.path / "graph.safetensors"
        if arrays is not None:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, tensors)
            for name, tensor in document["tensors"].items():
                for part in tensor["parts"]:
                    if f"{name}/{part}" in arrays:
                        data = np.ascontiguousarray(arrays[f"{name}/{part}"]).tobytes()
                        tensor["parts"][part] = {"sha256": hashlib.sha256(data).hexdigest()}
            document["files"] = {"graph.safetensors": {"bytes": tensors.stat().st_size}}
        document.pop("checksum", None)
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        (self.path / "graph.json").write_text(json.dumps(document))
