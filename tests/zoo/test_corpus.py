from __future__ import annotations

import pytest

from paring import zoo
from paring.errors import DataError, ZooError


def paragraphs(split: str) -> list[str]:
    parts = [part for text in zoo.texts("zoo:python-docs", split) for part in text.split("\n\n")]
    return [" ".join(part.split()) for part in parts]


def test_the_splits_share_no_paragraph() -> None:
    train, test = paragraphs("train"), paragraphs("test")
    assert len(set(train) | set(test)) == len(train) + len(test)
    assert sum(map(len, train)) > 2 * sum(map(len, test)) > 150_000


def test_the_splits_depend_on_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    monkeypatch.setattr(
        topics, "topics", {"b": "one\n\ntwo", "lambda": "three\n\none", "if": "one\n\nfour"}
    )
    first = [zoo.texts("zoo:python-docs", split) for split in ("train", "test")]
    monkeypatch.setattr(topics, "topics", dict(reversed(topics.topics.items())))
    assert [zoo.texts("zoo:python-docs", split) for split in ("train", "test")] == first
    assert sorted(text for split in first for text in split) == ["four", "one\n\ntwo", "three"]


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'; take train or test"):
        zoo.texts("zoo:python-docs", "dev")
    with pytest.raises(ZooError, match="is a model, not a text"):
        zoo.texts("zoo:smollm2-135m-instruct")
