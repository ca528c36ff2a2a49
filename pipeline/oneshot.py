"""A one-shot stage: calibration text in, one pass over the model's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..progress import Progress
from .data import calibration_tokens

if TYPE_CHECKING:
    from ..modifiers import Session
    from ..recipes import Stage


def run_oneshot(
    session: Session, stage: Stage, work: Path | None, progress: Progress | None = None
) -> None:
    """Run the modifiers of `stage` over `session.model` in place.

    Finished blocks are kept in `work`; a second call after a crash goes on from the last of them.
    """
    tokens = None
    if stage.data is not None:
        tokens = calibration_tokens(stage.data, session.tokenizer)
    session.run_oneshot(tokens, progress, work)
