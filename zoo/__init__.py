"""Models and texts by name: cards, stubs, download, verification, cache. Never imports torch."""

from __future__ import annotations

from .catalog import Card, ModelCard, TextCard, card, cards
from .corpus import texts
from .download import fetch, where
from .store import cache_dir, lock, sha256_of, transaction

__all__ = [
    "Card",
    "ModelCard",
    "TextCard",
    "cache_dir",
    "card",
    "cards",
    "fetch",
    "lock",
    "sha256_of",
    "texts",
    "transaction",
    "where",
]
