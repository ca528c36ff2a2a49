"""GPTQ for the logits matrix, which stands outside of the blocks and is often the embedding as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from ...errors import DataError, ModelError
from ..base import Modifier
from ..capture import BATCH, Stop
from ..hessian import Gram
from .gptq_problem import Problem
from .layer import attach, dequantize_weight
from .observers import set_integers
from .schemes import Preset, WeightObserver, preset

if TYPE_CHECKING:
    from ..session import Session

ROWS = 8192  # solved at once


class HeadGPTQ(Modifier):
    """Quantize the logits matrix by GPTQ (Frantar et al. 2022, arXiv 2210.17323), as `GPTQ` does the blocks' Linears.

    In a small model the logits matrix is a fifth of all weights, and decoding reads the whole of it for every token.
    Rounded to int4 it costs SmolLM2-135M a quarter more perplexity, by GPTQ 2 %. It stands after the modifiers that
    change the blocks, on whose outputs it is calibrated. Where the model ties it to the embedding, the embedding stays
    as it is, and the two part.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    scheme: Preset = "W4A16"
    """W4A16 or W8A16: the last activations stay in floating point. W4A8, W8A8: int8 per token, at some cost."""
    group_size: int | None = Field(default=64, ge=8)
    """Inputs that share a scale; none: per output channel, for 8-bit weights."""
    observer: WeightObserver = "imatrix_mse"
    """minmax, percentile, mse, or imatrix_mse, which weights columns by their input."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    sweeps: int = Field(default=2, ge=0)
    """Passes of coordinate descent after the loop, each after a refit of the scales."""

    @model_validator(mode="after")
    def _check_targets(self) -> HeadGPTQ:
        for name in ("targets", "ignore"):
            if name in self.model_fields_set:
                raise ValueError(f"HeadGPTQ quantizes the logits matrix alone; leave `{name}` out")
        return self

    def on_initialize(self, session: Session) -> None:
        if session.calibration is None:
            raise DataError(f"{session.label(self)} needs calibration data; give the stage `data:`")
        _, head = _head(session)
        embedding = session.model.get_input_embeddings()  # type: ignore[operator]
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
            session.model.config.tie_word_embeddings = False  # type: ignore[union-attr]

    def on_update(self, session: Session) -> None:
        name, head = _head(session)
        if name in session.quantization:
            raise ModelError(f"{session.label(self)}: {name} is quantized already")
        group = preset(self.scheme, [name], group_size=self.group_size, observer=self.observer)
        size = group.group_size_for(name, head.weight.shape[1])
        gram = self._observe(session, head)
        problem = Problem.of(gram, self.dampening_frac, reorder=True)
        held = session.masks.get(f"{name}.weight")
        weight = head.weight.detach().float()
        solved = []
        for first in range(0, len(weight), ROWS):
            rows = slice(first, first + ROWS)
            kept = weight[rows] != 0 if held is None else held[rows].to(weight.device)
            part = problem.solve(weight[rows], kept, size, group.weights, sweeps=self.sweeps)
            solved.append(part)
            session.tell(self, name, min(len(weight), first + ROWS), len(weight))
        q, scale = (torch.cat(parts) for parts in zip(*solved, strict=True))
        error = gram.relative_error(weight, dequantize_weight(q, scale))
        session.section(self)["errors"] = {name: error}
        session.quantization[name] = layer = set_integers(head, group, q, scale, None)
        attach(layer)

    def _observe(self, session: Session, head: nn.Linear) -> Gram:
        """X^T X of what the head reads, over the calibration tokens."""
        assert session.calibration is not None
        gram = Gram()

        def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            gram.add(args[0])
            raise Stop

        handle = head.register_forward_pre_hook(look)
        try:
            for done in range(0, len(session.calibration), BATCH):
                session.tell(self, "inputs", done, len(session.calibration))
                try:
                    tokens = session.calibration[done : done + BATCH]
                    session.model(tokens.to(session.device), use_cache=False)
                except Stop:
                    continue
        finally:
            handle.remove()
        return gram


def _head(session: Session) -> tuple[str, nn.Linear]:
    head = session.model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(session.model).__name__} has no Linear that makes its logits")
    return next(name for name, module in session.model.named_modules() if module is head), head
