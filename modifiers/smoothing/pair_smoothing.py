"""What the smoothing algorithms share: at each pair, observe, choose a scale per channel, fold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr

from ...errors import ModelError
from ..base import Modifier
from ..quantization.inputs import Inputs
from .pairs import Channels, Pair, find_pairs

if TYPE_CHECKING:
    from torch import nn

    from ..blocks import Block
    from ..session import Session

TOKENS = 4096  # of the calibration, for algorithms that try scales


class _PairSmoothing(Modifier):
    """A subclass defines `choose`. A pair is smoothed when one of its Linears is a target; all of them are scaled."""

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})
    preserves_function: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"_channels"})

    _channels: Channels = PrivateAttr(default_factory=dict)

    def on_initialize(self, session: Session) -> None:
        self._channels = {}

    def sources(self) -> Literal["norms", "all"]:
        """norms: only pairs whose source is a norm."""
        return "norms"

    def choose(
        self, pair: Pair, linears: list[nn.Linear], inputs: Inputs
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The scale of each source channel, f32 [width] > 0, and what the report should say of it.

        linears: the consumers that are targets. Where rounding is tried, `error` is what is left of `error_before`.
        """
        raise NotImplementedError

    def on_block(self, session: Session, block: Block) -> None:
        targets = block.linears(self.targets, self.ignore)
        if not targets:
            return
        _refuse_quantized(session, targets)
        pairs, refused = find_pairs(block, self._channels)
        wanted = ("norm", "linear") if self.sources() == "all" else ("norm",)
        pairs = [p for p in pairs if p.kind in wanted and targets.keys() & p.consumers.keys()]
        _refuse_quantized(
            session, (name for pair in pairs for name in (pair.name, *pair.consumers))
        )
        quota = -(-TOKENS // len(block.inputs))
        inputs = [Inputs(quota, session.seed) for _ in pairs]
        first = [next(iter(pair.consumers)) for pair in pairs]
        block.run({name: observer.add for name, observer in zip(first, inputs, strict=True)})
        section = session.section(self)
        errors: list[tuple[float, float]] = []
        for pair, observed in zip(pairs, inputs, strict=True):
            linears = [linear for name, linear in pair.consumers.items() if name in targets]
            scale, notes = self.choose(pair, linears, observed)
            pair.fold(scale)
            if "error" in notes:
                errors.append((notes["error_before"], notes["error"]))
            section.setdefault("pairs", {})[pair.name] = {
                "consumers": list(pair.consumers),
                "scale": [float(scale.min()), float(scale.max())],
                **notes,
            }
        if errors:
            before, after = (sum(column) / len(errors) for column in zip(*errors, strict=True))
            session.block_note = f"error {before:.2g} -> {after:.2g}"
        if refused:
            section.setdefault("not_exact", []).extend(refused)

    def on_finalize(self, session: Session) -> None:
        if "pairs" not in session.section(self):
            what = "norm" if self.sources() == "norms" else "norm or Linear"
            raise ModelError(
                f"{session.label(self)} found no {what} that feeds its targets {', '.join(self.targets)} and can be"
                " scaled exactly; take the modifier out, or target Linears that read one"
            )


def weight_maxima(linears: Iterable[nn.Linear]) -> torch.Tensor:
    """max_i |W_ij| over the rows of all the Linears, f32 [width]."""
    rows = [linear.weight.detach().float().abs().amax(dim=0) for linear in linears]
    return torch.stack(rows).amax(dim=0)


def _refuse_quantized(session: Session, names: Iterable[str]) -> None:
    for name in names:
        if name in session.quantization:
            raise ModelError(
                f"{name} is quantized already: scaling it would leave its integer grid; put smoothing before"
                " Quantization"
            )
