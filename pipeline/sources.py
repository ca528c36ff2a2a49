"""Rows of a data set, wherever it lives: the zoo, a local file or folder, or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError
from .durable import file_fingerprint

if TYPE_CHECKING:
    from ..recipes import DataConfig

Row = dict[str, Any]
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def rows(config: DataConfig) -> Sequence[Row]:
    """All rows of `config.dataset`'s split, in their stored order.

    A text file is one row with the column `text`; a zoo text set has one such row per document. A folder holds one
    file per split (`train.jsonl`). A hub id may name a configuration after a colon (`openai/gsm8k:main`).
    Raises DataError when it can't be found or read, or has no rows.
    """
    name = config.dataset
    path = Path(name).expanduser()
    if name.startswith("zoo:"):
        from .. import zoo

        found: Sequence[Row] = [{"text": text} for text in zoo.texts(name, split=config.split)]
    elif path.is_dir():
        found = _read_file(_split_file(path, config.split))
    elif path.suffix in SUFFIXES:
        if config.split != "train":
            raise DataError(
                f"{name}: a single file has no split {config.split!r}; leave `split` out, or name a "
                f"folder that holds {config.split}{path.suffix}"
            )
        found = _read_file(path)
    else:
        found = _read_hub(name, config.split)
    if not len(found):
        raise DataError(f"{name} (split {config.split}): no rows; name another data set or split")
    return found


def data_fingerprint(config: DataConfig) -> str:
    """Changes with the content of a local file; "" for data that are named by stub or id."""
    path = Path(config.dataset).expanduser()
    if path.is_dir():
        path = _split_file(path, config.split)
    return file_fingerprint(path) if path.is_file() else ""


def texts(config: DataConfig) -> list[str]:
    """One text per row: the text column, or prompt and answer joined when the config has templates."""
    if config.prompt is not None:
        return [prompt + answer for prompt, answer in prompts_and_answers(config)]
    table = rows(config)
    column = config.text or _only_text_column(config, table[0])
    _require(config, table[0], column)
    return [str(row[column]) for row in table]


def prompts_and_answers(config: DataConfig) -> list[tuple[str, str]]:
    """The two templates of `config` filled from every row; a missing one is empty."""
    prompt, answer = config.prompt or "", config.answer or ""
    table = rows(config)
    for template in (prompt, answer):
        for column in _columns_of(config, template):
            _require(config, table[0], column)
    return [(_fill(config, prompt, row), _fill(config, answer, row)) for row in table]


def _split_file(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    raise DataError(
        f"{folder}: no {split}.txt, .jsonl or .parquet; the folder has {', '.join(found) or 'none'}"
    )


def _read_file(path: Path) -> list[Row]:
    try:
        if path.suffix == ".txt":
            return [{"text": path.read_text(encoding="utf-8")}]
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return cast(list[Row], parquet.read_table(path).to_pylist())
        return _read_jsonl(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check `dataset` in the recipe") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def _read_jsonl(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; fix the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; write one object per line")
        found.append(row)
    return found


def _read_hub(name: str, split: str) -> Sequence[Row]:
    if not HUB_ID.fullmatch(name):
        raise DataError(
            f"{name}: not a data set; give zoo:<name>, a .txt, .jsonl or .parquet file, a folder "
            "of such files, or a Hugging Face id such as openai/gsm8k:main"
        )
    from datasets import load_dataset

    identity, _, configuration = name.partition(":")
    try:
        return cast(Sequence[Row], load_dataset(identity, configuration or None, split=split))
    except Exception as error:  # the library raises dozens of kinds, down to the HTTP client's
        raise DataError(
            f"{name}: no such file here, and Hugging Face `datasets` can't load it as a hub id "
            f"(split {split}): {error}"
        ) from error


def _only_text_column(config: DataConfig, row: Row) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if len(columns) == 1:
        return columns[0]
    raise DataError(
        f"{config.dataset}: which column is the text? It has {', '.join(map(repr, row))}; set "
        "`text:` to one of them, or `prompt:` and `answer:` to templates such as '{question}'"
    )


def _columns_of(config: DataConfig, template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"{config.dataset}: template {template!r}: {error}") from None
    for field in fields:
        if not field.isidentifier():
            raise DataError(
                f"{config.dataset}: template {template!r}: {{{field}}} is not a column name; write "
                "{{ and }} for literal braces"
            )
    return fields


def _require(config: DataConfig, row: Row, column: str) -> None:
    if column not in row:
        near = get_close_matches(column, list(row), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = ", ".join(map(repr, row))
        raise DataError(f"{config.dataset}: no column {column!r}; it has {has}{hint}")


def _fill(config: DataConfig, template: str, row: Row) -> str:
    parts = []
    for literal, field, _, _ in Formatter().parse(template):
        parts.append(literal)
        if field is not None:
            _require(config, row, field)
            parts.append(str(row[field]))
    return "".join(parts)
