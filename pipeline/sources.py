"""Rows of a data set, wherever it lives: the zoo, a local file or folder, or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..zoo import sha256_of
from .templates import Row

if TYPE_CHECKING:
    from ..recipes import DataConfig, RowsConfig

SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def rows(config: RowsConfig) -> Sequence[Row]:
    """All rows of `config.dataset`'s split, in their stored order.

    A text file is one row with the column `text`; a zoo text set has one such row per document. A folder holds one
    file per split (`train.jsonl`). A hub id may name a configuration after a colon (`openai/gsm8k:main`).
    Raises DataError when it can't be found or read, or has no rows.
    """
    file = _file(config)
    if config.dataset.startswith("zoo:"):
        found = _zoo_rows(config)
    else:
        found = _read_file(file) if file is not None else _read_hub(config, streaming=False)
    if not len(found):
        raise DataError(_empty(config))
    return found


def stream_rows(config: RowsConfig) -> Iterator[Row]:
    """As `rows`, one at a time, for what does not fit into memory; a text file's paragraphs are rows of their own."""
    file = _file(config)
    if config.dataset.startswith("zoo:"):
        found: Iterator[Row] = iter(_zoo_rows(config))
    else:
        found = _stream_file(file) if file is not None else _read_hub(config, streaming=True)
    empty = True
    for row in found:
        empty = False
        yield row
    if empty:
        raise DataError(_empty(config))


def data_fingerprint(config: DataConfig) -> str:
    """Changes with the content of local files; "" for data that are named by stub or id."""
    found = []
    for part in config.parts:
        file = None if part.dataset.startswith("zoo:") else _file(part)
        if file is None:
            found.append("")
            continue
        with _told(file):
            found.append(sha256_of(file))
    return " ".join(found).strip()


def _empty(config: RowsConfig) -> str:
    return f"{config.dataset} (split {config.split}): no rows; name another data set or split"


def _zoo_rows(config: RowsConfig) -> list[Row]:
    from .. import zoo

    return [{"text": text} for text in zoo.texts(config.dataset, split=config.split)]


def _file(config: RowsConfig) -> Path | None:
    """The local file meant; None for a name of the hub."""
    path = Path(config.dataset).expanduser()
    if path.is_dir():
        return _split_file(path, config.split)
    if path.suffix not in SUFFIXES:
        return None
    if config.split != "train":
        raise DataError(
            f"{config.dataset}: a single file has no split {config.split!r}; leave `split` out, or name a "
            f"folder that holds {config.split}{path.suffix}"
        )
    return path


def _split_file(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    raise DataError(
        f"{folder}: no {split}.txt, .jsonl or .parquet; the folder has {', '.join(found) or 'none'}"
    )


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".txt":
        with _told(path):
            return [{"text": path.read_text(encoding="utf-8")}]
    return list(_stream_file(path))


def _stream_file(path: Path) -> Iterator[Row]:
    with _told(path):
        if path.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            yield from _paragraphs(lines) if path.suffix == ".txt" else _objects(path, lines)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong with a file, as a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check `dataset` in the recipe") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[Row]:
    """Runs of lines that aren't blank."""
    paragraph = ""
    for line in lines:
        if line.strip():
            paragraph += line
        elif paragraph:
            yield {"text": paragraph}
            paragraph = ""
    if paragraph:
        yield {"text": paragraph}


def _objects(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """JSON lines."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; fix the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; write one object per line")
        yield row


def _read_hub(config: RowsConfig, streaming: bool) -> Any:
    name = config.dataset
    if not HUB_ID.fullmatch(name):
        raise DataError(
            f"{name}: not a data set; give zoo:<name>, a .txt, .jsonl or .parquet file, a folder "
            "of such files, or a Hugging Face id such as openai/gsm8k:main"
        )
    from datasets import load_dataset

    identity, _, configuration = name.partition(":")
    try:
        found = load_dataset(
            identity, configuration or None, split=config.split, streaming=streaming
        )
        return iter(found) if streaming else found
    except Exception as error:  # the library raises dozens of kinds, down to the HTTP client's
        raise DataError(
            f"{name}: no such file here, and Hugging Face `datasets` can't load it as a hub id "
            f"(split {config.split}): {error}"
        ) from error
