"""Hugging Face folders: config, tokenizer, tensors and pruning masks, read with numpy only."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from . import storage
from .graph import Tokenizer
from .lowering.config import Config
from .strict_json import parse
from .tensor_file import TensorFile, to_float32

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MASKS = "pruning_masks.npz"
TOKENIZER = "tokenizer.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass
class Checkpoint:
    """An opened folder. `taken` remembers which tensors were read, so that none is forgotten."""

    folder: Path
    config: Config
    files: dict[str, TensorFile]
    masks: dict[str, NDArray[np.uint8]]
    taken: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises GraphError unless `folder` holds config.json and safetensors weights."""
        folder = Path(folder)
        config = Config(read_object(folder / "config.json"), str(folder / "config.json"))
        return cls(folder, config, _tensor_files(folder), _masks(folder / MASKS))

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as stored (bfloat16 as its bits)."""
        if name not in self.files:
            raise GraphError(f"{self.folder}: no tensor {name!r}; is the checkpoint complete?")
        self.taken.add(name)
        return self.files[name].array(name)

    def forget_pages(self) -> None:
        """Let go of what was read of the weight files: else all of them end up in memory."""
        for file in set(self.files.values()):
            file.forget_pages()

    def dtype(self, name: str) -> str:
        """Its safetensors dtype."""
        return self.files[name].entries[name].dtype

    def float32(self, name: str) -> NDArray[np.float32]:
        """A floating-point tensor as float32."""
        array = self.raw(name)
        if self.dtype(name) not in ("F64", "F32", "F16", "BF16"):
            raise GraphError(f"{self.folder}: {name} is {self.dtype(name)}, not floating point")
        return to_float32(array, self.dtype(name))

    def mask(self, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """The exact pruning mask of a weight [n, k], True = kept, where one was saved."""
        if name not in self.masks:
            return None
        self.taken.add(name)
        packed = self.masks[name]
        n, k = shape
        if packed.dtype != np.uint8 or packed.shape != (n, -(-k // 8)):
            raise GraphError(f"{self.folder / MASKS}: {name} does not fit a weight {[n, k]}")
        if not storage.padding_is_zero(packed, k):
            raise GraphError(f"{self.folder / MASKS}: {name} has bits past the last column")
        return storage.unpack_mask(packed, k)

    def optional(self, name: str) -> dict[str, Any]:
        """A JSON object beside config.json, {} where there is none."""
        path = self.folder / name
        return read_object(path) if path.exists() else {}

    def sampling(self) -> dict[str, Any]:
        """The sampling settings of generation_config.json."""
        found = self.optional("generation_config.json")
        return {key: found[key] for key in SAMPLING if found.get(key) is not None}

    def tokenizer(self) -> tuple[Tokenizer | None, bytes]:
        """The tokenizer's record and file, or None where the folder has no tokenizer.json."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            return None, b""
        data = _read(path)
        generation = self.optional("generation_config.json")

        def special(key: str) -> list[int]:
            found = generation.get(key)
            found = self.config.value(key, None) if found is None else found
            found = [] if found is None else found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in found):
                raise GraphError(f"{self.folder}: {key} is {found!r}; it must be a token id")
            return found

        bos = special("bos_token_id")
        tokenizer = Tokenizer(
            file=TOKENIZER,
            sha256=hashlib.sha256(data).hexdigest(),
            bos=bos[0] if bos else None,
            eos=tuple(special("eos_token_id")),
            chat_template=self._chat_template(),
        )
        return tokenizer, data

    def _chat_template(self) -> str | None:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return _read(path).decode("utf-8", "replace")
        found = self.optional("tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; GraphError if there is none."""
    found = parse(_read(path), str(path))
    if not isinstance(found, dict):
        raise GraphError(f"{path}: not a JSON object")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GraphError(
            f"{path}: can't be read ({error.strerror}); give a Hugging Face model folder"
        ) from None


def _tensor_files(folder: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it."""
    if (folder / WEIGHTS).is_file():
        file = TensorFile(folder / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if not (folder / INDEX).is_file():
        raise GraphError(
            f"{folder}: no {WEIGHTS} and no {INDEX}; save the model with safe_serialization=True"
        )
    found = read_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in found.values()
    ):
        raise GraphError(f"{folder / INDEX}: weight_map must map tensors to files of this folder")
    shards = {name: TensorFile(folder / name) for name in sorted(set(found.values()))}
    for tensor, shard in found.items():
        if tensor not in shards[shard].entries:
            raise GraphError(f"{folder / shard}: no tensor {tensor!r}, which {INDEX} promises")
    return {tensor: shards[shard] for tensor, shard in found.items()}


def _masks(path: Path) -> dict[str, NDArray[np.uint8]]:
    if not path.exists():
        return {}
    try:
        # Opened here: numpy leaves the file open when it is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise GraphError(f"{path}: can't be read ({error}); write the checkpoint again") from None
