from __future__ import annotations

from pathlib import Path

import pytest

from paring import zoo


def test_a_transaction_that_succeeds_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with zoo.transaction(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert not final.exists()
    assert (final / "sub" / "file").read_text() == "text"
    assert list(final.parent.iterdir()) == [final]
    assert final.stat().st_mode & 0o700 == 0o700


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no"),
        zoo.transaction(tmp_path / "model") as folder,
    ):
        (folder / "file").write_text("text")
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_transactions_stays(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with zoo.transaction(final) as slow:
        (slow / "file").write_text("slow")
        with zoo.transaction(final) as quick:
            (quick / "file").write_text("quick")
    assert (final / "file").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [final]


def test_a_lock_removes_what_killed_makers_left(tmp_path: Path) -> None:
    (tmp_path / ".model.abc.partial").mkdir()
    (tmp_path / ".other.abc.partial").mkdir()
    with zoo.lock(tmp_path / "model"):
        assert not (tmp_path / ".model.abc.partial").exists()
    assert (tmp_path / ".other.abc.partial").exists()


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARING_CACHE", str(tmp_path))
    assert zoo.cache_dir() == tmp_path
    monkeypatch.delenv("PARING_CACHE")
    assert zoo.cache_dir().name == "paring"
