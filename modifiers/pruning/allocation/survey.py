"""An observe pass that prunes every layer in several ways for trial, and keeps what each would cost the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ....errors import DataError
from ...hessian import Gram
from ...mask_structure import MaskStructure
from ..layer import not_gone
from .importance import importance
from .profile import Place, Profile
from .trial import Trial

if TYPE_CHECKING:
    from ...blocks import Block
    from ...session import Session

ITERATIONS = 7


class Survey(Profile):
    """Tries each pattern of `tries` (by its text) at its sparsities, on every layer that it divides."""

    needs_pass: ClassVar[bool] = True

    def __init__(
        self, tries: Mapping[str, Sequence[float]], samples: int, weigh_outputs: bool
    ) -> None:
        """samples: how many calibration sequences the importance of outputs is taken from; weigh_outputs: see Trial."""
        self.tries = tries
        self.samples = samples
        self.weigh_outputs = weigh_outputs

    def observe(
        self,
        session: Session,
        block: Block,
        linears: dict[str, nn.Linear],
        places: dict[str, Place],
        found: dict[str, Any],
    ) -> None:
        """`found[layer][pattern]` becomes [[error, weights, blocks] of each sparsity]."""
        if "importance" not in found:
            if session.calibration is None:
                raise DataError(f"{block.reader} needs calibration data; give the stage `data:`")
            modules = dict(session.modules(list(places)))
            every = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
            tokens = session.calibration[: self.samples]
            found["importance"] = importance(session.model, every, tokens, seed=None)
        groups = [(names, Gram()) for names in block.shared_inputs(linears)]
        block.run({names[0]: gram.add for names, gram in groups})
        for names, gram in groups:
            trial = Trial(gram, ITERATIONS, self.weigh_outputs)
            for name in names:
                weight = linears[name].weight.detach().float()
                kept = not_gone(session, name, weight)
                minded = found["importance"][name].to(weight.device)
                found[name] = {
                    text: [list(trial.run(weight, kept, structure, s, minded)) for s in sparsities]
                    for text, sparsities in self.tries.items()
                    if (structure := MaskStructure.parse(text)).divides(tuple(weight.shape))
                }
