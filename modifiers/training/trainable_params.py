"""Which parameters a stretch of training changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr
from torch import nn

from ...errors import ModelError
from ..base import Modifier

if TYPE_CHECKING:
    from ..session import Session


class TrainableParams(Modifier):
    """Freeze the parameters of the targets while the window is open, or all others.

    A frozen parameter gets no gradient, so the optimizer leaves it and its moments alone: no step, no weight decay.
    Targets mean modules, with everything in them (`re:model.layers.0$` is a whole block). A tied matrix is one
    parameter: freezing the embedding freezes the head. Pruning still acts on frozen weights.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    trains_weights: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"_frozen"})

    trainable: bool = False
    """False: the targets are frozen. True: only the targets are trained, and everything else is frozen."""

    _frozen: list[nn.Parameter] = PrivateAttr(default_factory=list)
    _active: bool = PrivateAttr(default=False)

    def frozen_names(self, session: Session) -> list[str]:
        """The full names of the parameters that are frozen while the window is open."""
        modules = session.modules(self.targets, self.ignore)
        meant = {id(p) for _, module in modules for p in module.parameters()}
        named = session.model.named_parameters()
        return [name for name, p in named if (id(p) in meant) is not self.trainable]

    def on_initialize(self, session: Session) -> None:
        names = self.frozen_names(session)
        parameters = dict(session.model.named_parameters())
        if len(names) == len(parameters):
            raise ModelError(f"{session.label(self)} would freeze the whole model; name fewer")
        # Those that are frozen anyway stay so at the end.
        self._frozen = [parameters[name] for name in names if parameters[name].requires_grad]
        session.section(self)["frozen"] = sum(parameters[name].numel() for name in names)

    def on_start(self, session: Session) -> None:
        self._freeze(True)

    def on_gradients(self, session: Session) -> None:
        # Also what an earlier backward or another modifier's end may have brought.
        for parameter in self._frozen:
            parameter.grad = None

    def on_end(self, session: Session) -> None:
        self._freeze(False)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._freeze(self._active)

    def _freeze(self, active: bool) -> None:
        self._active = active
        for parameter in self._frozen:
            parameter.requires_grad_(not active)
