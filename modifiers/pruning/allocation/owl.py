"""OWL: blocks with more outliers keep more weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .profile import Place, Profile, Share, shares

if TYPE_CHECKING:
    from ...blocks import Block
    from ...session import Session


class OWL(Profile):
    """Outlier weighed layerwise sparsity (Yin et al. 2023, arXiv 2310.05175, section 3.2): one sparsity per block.

    D = 100 * the fraction of a block's scores |W_ij| ||X_j|| above m times their mean, mapped to [0, 2 lambda] from the
    least to the most of all blocks; sparsity S - (D - mean D), so every block stays within S +- 2 lambda. The mean over
    blocks is weighted by size.
    """

    needs_pass: ClassVar[bool] = True

    def __init__(self, m: float, lmbda: float) -> None:
        self.m, self.lmbda = m, lmbda

    def observe(
        self,
        session: Session,
        block: Block,
        linears: dict[str, nn.Linear],
        places: dict[str, Place],
        found: dict[str, Any],
    ) -> None:
        groups = [(names, _Energy()) for names in block.shared_inputs(linears)]
        block.run({names[0]: energy.add for names, energy in groups})
        scores = [
            (linears[name].weight.detach().float().abs() * energy.total.sqrt()).flatten()
            for names, energy in groups
            for name in names
        ]
        if scores:
            together = torch.cat(scores)
            above = (together > self.m * together.mean()).float().mean()
            found[str(block.index)] = 100.0 * float(above)

    def allocate(
        self, places: dict[str, Place], found: dict[str, Any], structure: str, sparsity: float
    ) -> dict[str, Share]:
        least, most = min(found.values()), max(found.values())
        scale = 2 * self.lmbda / (most - least) if most > least else 0.0
        wanted = {
            name: sparsity - scale * (found[str(place.block)] - least)
            for name, place in places.items()
        }
        return shares(wanted, places, structure, sparsity)


class _Energy:
    """Sums the squares of each input, f32 [in]."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        self.total = self.total.to(x.device) + x.reshape(-1, x.shape[-1]).float().square().sum(0)
