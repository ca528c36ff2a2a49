"""The "did you mean" of every message."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, case aside; None when nothing is close."""
    by_lower = {name.lower(): name for name in known}
    lower = word.lower()
    if lower in by_lower:
        return by_lower[lower]
    found = get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    if found:
        return by_lower[found[0]]
    # A word cut short or made longer: `epoch` for `epochs`, `start_epoch` for `start`.
    starts = [n for n in by_lower if len(n) > 2 and (lower.startswith(n) or n.startswith(lower))]
    return by_lower[max(starts, key=len)] if starts and len(lower) > 2 else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean 'x'?`, or the other advice when no known word is close."""
    found = nearest(word, known)
    return f"did you mean {found!r}?" if found else otherwise
