from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from paring.engine.protocol import measure, read_items, split_item
from paring.errors import DataError


def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token is a letter and the spaces before it, so that ` 4` is one token."""
    ids, places, start = [], [], 0
    for place, letter in enumerate(text):
        if letter != " ":
            ids.append(ord(letter) % 64)
            places.append((start, place + 1))
            start = place + 1
    return ids, places


def uniform(ids: list[int]) -> np.ndarray:
    return np.zeros((len(ids), 64), np.float32)


def write_items(path: Path, count: int) -> Path:
    items = [{"question": f"{i} + {i}?", "answer": f"{i}. #### {2 * i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, items)) + "\n")
    return path


def test_text_is_cut_into_windows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd" * 400)
    found = measure(tmp_path / "text.txt", encode, uniform, 3)
    assert (found.windows, found.tokens) == (3, 3 * 511)
    assert found.value == pytest.approx(64)
    with pytest.raises(DataError, match="3 windows of 512, not 40"):
        measure(tmp_path / "text.txt", encode, uniform)


def test_items_count_their_answers_only(tmp_path: Path) -> None:
    path = write_items(tmp_path / "items.jsonl", 70)
    found = measure(path, encode, uniform)
    expected = sum(len(encode(f" {i}. #### {2 * i}")[0]) for i in range(64))
    assert (found.windows, found.tokens) == (64, expected)
    assert math.isclose(found.value, 64, rel_tol=1e-6)


def test_items_are_written_as_the_protocol_says(tmp_path: Path) -> None:
    path = write_items(tmp_path / "items.jsonl", 2)
    assert read_items(path, 2)[1] == ("Question: 1 + 1?\nAnswer:", " 1. #### 2")
    prompt, answer = split_item(encode, *read_items(path, 2)[1])
    assert prompt + answer == encode("Question: 1 + 1?\nAnswer: 1. #### 2")[0]
    assert answer[0] == ord("1") % 64  # the token ` 1` is the answer's


def test_separators_inside_of_strings_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = {"question": "a\u2028b", "answer": "c\x85d\u2029"}
    path.write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_items(path, 1) == [("Question: a\u2028b\nAnswer:", " c\x85d\u2029")]


@pytest.mark.parametrize("line", ["[]", "{}", '{"question": "q"}', "text", "3"])
def test_bad_items_are_told_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"items\.jsonl:3"):
        measure(path, encode, uniform)


def test_missing_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        measure(tmp_path / "nothing.txt", encode, uniform)
    with pytest.raises(DataError, match="5 items, not 64"):
        measure(write_items(tmp_path / "items.jsonl", 5), encode, uniform)
