"""Texts of the zoo that need no network."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.util import find_spec

from ..errors import DataError, ZooError
from .catalog import TextCard, card

TEST_SHARE = 0.16


def texts(stub: str, split: str = "train") -> list[str]:
    """The documents of a text card in one split, "train" or "test"; the same in every run.

    A document belongs to a split by the hash of its name. No paragraph comes twice: a document that
    quotes a shorter one loses the quotation, so nothing of the test split is in the train split.
    Raises ZooError if the stub names no text, DataError for another split.
    """
    found = card(stub)
    if not isinstance(found, TextCard):
        raise ZooError(f"{found.stub}: is a {found.kind}, not a text; a data set must be a text")
    if split not in ("train", "test"):
        raise DataError(f"{found.stub}: has no split {split!r}; take train or test")
    if find_spec(found.documents) is None:
        raise ZooError(f"{found.stub}: this Python was installed without its {found.documents}")
    documents: dict[str, str] = import_module(found.documents).topics
    seen: set[str] = set()
    chosen = []
    for name in sorted(documents, key=lambda name: (len(documents[name]), name)):
        fresh = []
        for paragraph in documents[name].split("\n\n"):
            words = " ".join(paragraph.split())  # a quotation may be indented
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if fresh and _is_test(name) == (split == "test"):
            chosen.append("\n\n".join(fresh))
    return chosen


def _is_test(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 * TEST_SHARE
