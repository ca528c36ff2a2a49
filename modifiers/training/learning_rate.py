"""The learning rate, scheduled inside a window of a training stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator

from ...errors import ModelError
from ..base import Modifier
from ..schedule import Milestones, Scheduler, ramp, stepped

if TYPE_CHECKING:
    from ..session import Session

THEIRS = "scheduler's lr"  # key of a parameter group, between `on_gradients` and `on_step` only


class LearningRate(Modifier):
    """Set the optimizer's learning rate while the window is open, as SparseML's LearningRateFunctionModifier did.

    Inside [start, end) this rate is the one every step is made with, in all parameter groups; before and after, the
    stage's own `learning_rate` and `lr_scheduler` decide. Their schedule runs on unseen meanwhile: each step this rate
    is put in place just before the optimizer steps, and the scheduler's is put back right after. Of two LearningRates
    whose windows overlap, the later in the list wins.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    timing: ClassVar[frozenset[str]] = Modifier.timing | {"milestones"}
    unused: ClassVar[frozenset[str]] = frozenset({"targets", "ignore"})

    init_lr: float = Field(ge=0)
    """The rate at `start`; alone, the rate throughout."""
    final_lr: float | None = Field(default=None, ge=0)
    """The rate that is reached at `end`."""
    lr_func: Scheduler = "linear"
    """How the rate goes from `init_lr` to `final_lr`: linear, cosine, cubic or polynomial."""
    power: float = Field(default=3.0, gt=0)
    """The power of lr_func: polynomial; 1 is linear."""
    milestones: Milestones | None = None
    """Instead of final_lr, steps: {time: the rate from then on}."""

    _rate: float = PrivateAttr(default=0.0)

    @model_validator(mode="after")
    def _check_rates(self) -> LearningRate:
        if self.milestones is not None and self.final_lr is not None:
            raise ValueError("final_lr and milestones exclude each other; keep one")
        if any(rate < 0 for rate in (self.milestones or {}).values()):
            raise ValueError("a learning rate in milestones is below 0")
        return self

    def scheduled_rate(self, session: Session) -> float:
        """The rate due at the session's step."""
        if self.milestones is not None:
            return stepped(self.init_lr, self.milestones, lambda t: session.reached(self, t))
        if self.final_lr is None:
            return self.init_lr
        progress = session.progress(self)
        return ramp(self.lr_func, self.init_lr, self.final_lr, progress, self.power)

    def on_update(self, session: Session) -> None:
        self._rate = self.scheduled_rate(session)

    def on_gradients(self, session: Session) -> None:
        if session.optimizer is None:
            raise ModelError(
                f"{session.label(self)} got no optimizer; call session.before_optimizer(optimizer)"
            )
        for group in session.optimizer.param_groups:
            group.setdefault(THEIRS, group["lr"])
            group["lr"] = self._rate

    def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        groups = [group for group in optimizer.param_groups if THEIRS in group]
        if groups:  # else another LearningRate has done it
            session.log("learning_rate", groups[0]["lr"])
        for group in groups:
            group["lr"] = group.pop(THEIRS)
