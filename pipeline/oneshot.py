"""A one-shot stage: calibration text in, one pass over the model's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError
from ..progress import Progress
from .data import calibration_tokens

if TYPE_CHECKING:
    from ..modifiers import Session
    from ..recipes import Stage

CPU = torch.device("cpu")


def run_oneshot(
    session: Session,
    stage: Stage,
    work: Path | None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> torch.device:
    """Run the modifiers of `stage` over `session.model` in place; returns the device that did it.

    Finished blocks are kept in `work`; a second call after a crash goes on from the last of them. `device` not given:
    a GPU if there is one with room, else the CPU. The model is on the CPU again afterwards.
    """
    tokens = None
    if stage.data is not None:
        tokens = calibration_tokens(stage.data, session.tokenizer)
    chosen = device or _roomy_gpu(session, tokens) or CPU
    session.to(chosen)
    try:
        session.run_oneshot(tokens, progress, work)
    finally:
        session.to(CPU)
    return chosen


def named_device(name: str | None) -> torch.device | None:
    """The device of that name. ModelError when it can't be used here; None for None."""
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device {name}: PyTorch can't use it here ({reason}); give cpu, or leave it out"
        ) from error


def _roomy_gpu(session: Session, tokens: torch.Tensor | None) -> torch.device | None:
    """A GPU with room for the weights twice (a block's statistics are far less) and two streams of hidden states."""
    if not torch.cuda.is_available():
        return None
    weights = sum(p.numel() * p.element_size() for p in session.model.parameters())
    hidden = 0
    if tokens is not None:
        model: Any = session.model
        hidden = 4 * model.config.get_text_config().hidden_size * tokens.numel()
    free, _ = torch.cuda.mem_get_info()
    return torch.device("cuda") if 2 * (weights + hidden) <= free else None
