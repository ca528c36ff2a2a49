"""Models and tokenizers from a zoo stub, a Hugging Face id, a folder, or a GGUF file; always in float32."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import zoo
from ..errors import ModelError
from ..progress import Progress
from .stored_caches import round_caches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    ref: str | Path, progress: Progress | None = None, dequantize: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and eval mode on the CPU, and its tokenizer.

    A compressed-tensors checkpoint computes as it was quantized, activations too (`transformers` sees to it); with
    `dequantize` it becomes a plain float model with the same weights, to be changed further. Raises ModelError when
    `ref` names nothing that can be loaded, ZooError for a bad stub.
    """
    place = resolve_model(ref, progress)
    config = _guarded(place, lambda: AutoConfig.from_pretrained(place))
    quantization = getattr(config, "quantization_config", None) or {}
    compressed = quantization.get("quant_method") == "compressed-tensors"
    if compressed and dequantize:
        quantization["dequantize"] = True
    model, tokenizer = _load(place, config=config)
    if compressed and dequantize:
        _forget_quantization(model)
    elif compressed:  # it decompresses in its first forward, with bars
        round_caches(model, place, quantization.get("kv_cache_scheme"))
        with _silent(), torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    if progress:
        progress("load model", 1, 1, str(ref))
    return model, tokenizer


def resolve_model(ref: str | Path, progress: Progress | None = None) -> Path | str:
    """Where `ref` is: a Hugging Face folder on this machine, or the hub id itself.

    A zoo stub is fetched, and a GGUF file (or a folder with one and no `config.json`) is unpacked to a float32
    folder once, kept in the zoo's cache.
    """
    if str(ref).startswith("zoo:"):
        return _folder(zoo.fetch(str(ref), progress=progress), progress)
    path = Path(ref).expanduser()
    if path.exists():
        return _folder(path, progress)
    if path.is_absolute() or str(ref).startswith((".", "~")) or str(ref).count("/") != 1:
        raise ModelError(
            f"model {ref}: no such folder; give zoo:<name> (`recipe zoo list`), a Hugging Face id, "
            "a model folder, or a .gguf file"
        )
    return str(ref)


def model_fingerprint(ref: str | Path, progress: Progress | None = None) -> str:
    """Hex digest that changes with the model's configuration or weights."""
    place = resolve_model(ref, progress)
    digest = hashlib.sha256()
    if isinstance(place, str):
        config = _guarded(place, lambda: AutoConfig.from_pretrained(place))
        digest.update(f"{place}@{config._commit_hash}".encode())
        return digest.hexdigest()
    digest.update((place / "config.json").read_bytes())
    for file in sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
        digest.update(f"{file.name}:{zoo.sha256_of(file)}".encode())
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice from `transformers` meanwhile: progress is told through `Progress`."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _silent() -> Iterator[None]:
    """As `quiet_transformers`, and no bars of what it calls (GGUF, compressed-tensors), which ask nobody."""
    whole, begin = vars(tqdm)["__init__"], tqdm.__init__

    def begin_disabled(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **{**options, "disable": True})

    tqdm.__init__ = begin_disabled
    try:
        with quiet_transformers():
            yield
    finally:
        tqdm.__init__ = whole


def _folder(path: Path, progress: Progress | None) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        return _unpacked(path, progress)
    if not path.is_dir():
        raise ModelError(f"model {path}: not a folder and not a .gguf file")
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _unpacked(files[0], progress)
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"model {path}: holds several GGUF files ({names}); name one of them")
    raise ModelError(f"model {path}: has neither config.json nor a .gguf file; is it unfinished?")


def _unpacked(file: Path, progress: Progress | None) -> Path:
    """Hugging Face folder (float32) with the weights of a GGUF file, made once per content."""
    final = Path(zoo.cache_dir()) / "unpacked" / f"{file.stem}-{zoo.sha256_of(file)[:12]}"
    if (final / "config.json").is_file():
        return final
    if progress:
        progress("unpack model", 0, 1, file.name)
    model, tokenizer = _load(file.parent, gguf_file=file.name)
    _forget_quantization(model)
    with zoo.lock(final), zoo.transaction(final) as folder, _silent():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _forget_origin(folder / "config.json")
    if progress:
        progress("unpack model", 1, 1, file.name)
    return final


def _forget_quantization(model: PreTrainedModel) -> None:
    """`save_pretrained` refuses a float model that still remembers how its file was quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]


def _forget_origin(file: Path) -> None:
    """Drop `_model_name_or_path`: GGUF puts a free title there, which `transformers` would take for a path."""
    config = json.loads(file.read_text())
    config.pop("_model_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load(place: Path | str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    def both() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=options.get("gguf_file"))
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        return model, tokenizer

    model, tokenizer = _guarded(place, both)
    model.eval()
    return model, tokenizer


def _guarded(place: Path | str, load: Any) -> Any:
    try:
        with _silent():
            return load()
    except Exception as error:  # from a missing file to a refused connection: all mean the same
        raise ModelError(f"model {place}: `transformers` can't load it: {error}") from error
