"""ATP: sparsity rises linearly with depth."""

from __future__ import annotations

from typing import Any

from .profile import Place, Profile, Share, shares


class ATP(Profile):
    """Arithmetic progression (arXiv 2502.14770): block i of L gets S - b (L - 1) / 2 + b (i - 1), early ones keep more.

    `spread` is b (L - 1), the difference between the last block and the first, so that it means the same for every
    depth. The mean over blocks is weighted by size.
    """

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def allocate(
        self, places: dict[str, Place], found: dict[str, Any], structure: str, sparsity: float
    ) -> dict[str, Share]:
        last = max(place.block for place in places.values()) or 1
        wanted = {name: sparsity + self.spread * p.block / last for name, p in places.items()}
        return shares(wanted, places, structure, sparsity)
