"""Perplexity of a model on a data file, text or questions with answers, whatever runs the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..errors import DataError
from ..progress import Progress
from .perplexity import Logits, Perplexity, answer_perplexity, perplexity

# Text -> token ids without special tokens, and the [start, stop) characters of each token.
Encode: TypeAlias = Callable[[str], tuple[list[int], list[tuple[int, int]]]]

WINDOW, WINDOWS, ITEMS = 512, 40, 64


def measure(
    data: str | Path,
    encode: Encode,
    logits: Logits,
    count: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity on a file: `.jsonl` as questions with answers, anything else as text.

    count: windows of 512 tokens (default 40), or items (default 64). Items are written
    `Question: {question}\\nAnswer: {answer}` and only the answers' tokens count. Raises DataError.
    """
    path = Path(data)
    if path.suffix == ".jsonl":
        items = [split_item(encode, *pair) for pair in read_items(path, count or ITEMS)]
        return answer_perplexity(logits, items, progress)
    tokens, _ = encode(_read(path))
    return perplexity(logits, tokens, WINDOW, count or WINDOWS, progress)


def read_items(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` prompts and answers of a file of `{"question": ..., "answer": ...}` lines."""
    found: list[tuple[str, str]] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if len(found) == count:
            break
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            question, answer = item["question"], item["answer"]
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f'{path}:{number}: not an object with "question" and "answer"; for other files use '
                "plain text"
            ) from None
        found.append((f"Question: {question}\nAnswer:", f" {answer}"))
    if len(found) < count:
        raise DataError(f"{path}: {len(found)} items, not {count}; ask for fewer")
    return found


def split_item(encode: Encode, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, tokenized together; a token across the border is the answer's."""
    tokens, places = encode(prompt + answer)
    border = sum(stop <= len(prompt) for _, stop in places)
    return tokens[:border], tokens[border:]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error})") from None
