"""What the smoothing algorithms share: at each norm -> Linears pair, observe, compute a scale per channel, fold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch

from ...errors import ModelError
from ..base import Modifier
from .pairs import find_pairs

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class _NormSmoothing(Modifier):
    """A subclass defines `scale`. A pair is smoothed when one of its Linears is a target; all of them are scaled."""

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})
    preserves_function: ClassVar[bool] = True

    def scale(self, activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Scale per channel: activations max |X_j| and weights max_i |W_ij|, f32 [width] each; returns [width] > 0."""
        raise NotImplementedError

    def on_block(self, session: Session, block: Block) -> None:
        targets = block.linears(self.targets, self.ignore)
        _refuse_quantized(session, targets)
        pairs, refused = find_pairs(block)
        pairs = [pair for pair in pairs if targets.keys() & pair.consumers.keys()]
        largest = {next(iter(pair.consumers)): _Largest() for pair in pairs}
        block.run({name: observer.add for name, observer in largest.items()})
        section = session.section(self)
        for pair in pairs:
            activations = largest[next(iter(pair.consumers))].value
            weights = torch.stack(
                [linear.weight.float().abs().amax(dim=0) for linear in pair.consumers.values()]
            ).amax(dim=0)
            scale = self.scale(activations, weights)
            pair.fold(scale)
            section.setdefault("pairs", {})[pair.name] = {
                "consumers": list(pair.consumers),
                "scale": [float(scale.min()), float(scale.max())],
            }
        if refused:
            section.setdefault("not_exact", []).extend(refused)

    def on_finalize(self, session: Session) -> None:
        if "pairs" not in session.section(self):
            raise ModelError(
                f"{session.label(self)} found no norm that feeds its targets {', '.join(self.targets)} and can be"
                " scaled exactly; take the modifier out, or target Linears that read a norm"
            )


class _Largest:
    """Observer: the largest |X_j| of each input channel, f32 [width]."""

    def __init__(self) -> None:
        self.value = torch.zeros(0)

    def add(self, x: torch.Tensor) -> None:
        largest = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).float()
        self.value = torch.maximum(self.value, largest) if self.value.numel() else largest


def _refuse_quantized(session: Session, names: Iterable[str]) -> None:
    for name in names:
        if name in session.quantization:
            raise ModelError(
                f"{name} is quantized already: scaling it would leave its integer grid; put smoothing before"
                " Quantization"
            )
