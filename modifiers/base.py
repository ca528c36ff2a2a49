"""The base class of every modifier, and the registry that recipes read.

A modifier is a pydantic model: its fields are the keys of a recipe, its private attributes are run state. It acts by
defining hooks, the `on_*` methods below; the session calls them. See docs/architecture.md.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import ParingError
from .mask_structure import structures_of
from .schedule import Unit

if TYPE_CHECKING:
    from .blocks import Block
    from .session import Session

_registry: dict[str, type[Modifier]] = {}
_entry_points_loaded = False


class ModifierError(ParingError, TypeError):
    """A modifier class is defined wrongly, or a file of modifiers can't be loaded."""


class Modifier(BaseModel):
    """One change to a model, with its time window. Subclass it, add fields, define hooks.

    Defining a subclass registers it, unless its name starts with an underscore (a shared base).
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot", "train"})
    """The kinds of stage this modifier may stand in."""
    preserves_function: ClassVar[bool] = False
    """True: a block computes the same after `on_block` as before; the session checks it."""
    needs_reference: ClassVar[bool] = False
    """True: `on_block` asks for `block.reference_outputs()`, of the model as it was before the pass."""
    transient: ClassVar[frozenset[str]] = frozenset()
    """Private attributes that `state_dict` leaves out because `on_initialize` makes them again."""
    trains_weights: ClassVar[bool] = False
    """True: in a training stage it needs the weights themselves trained, which `lora` freezes."""
    timing: ClassVar[frozenset[str]] = frozenset({"start", "end", "update_frequency", "unit"})
    """The fields that are about time; a one-shot stage, which has none, refuses them."""

    training_only: ClassVar[frozenset[str]] = frozenset()
    """Fields besides `timing` that mean something in a training stage alone."""
    unused: ClassVar[frozenset[str]] = frozenset()
    """Fields of this class that mean nothing to a subclass; a recipe that gives one is refused. A subclass without
    `update_frequency` has no updates in a training stage."""

    targets: list[str] = ["Linear"]
    """Which modules: a class name, a full or trailing part of a name, or `re:` and a regular expression."""
    ignore: list[str] = []
    """Which of the targets to leave alone, in the same forms."""
    start: float = Field(default=0.0, ge=0)
    """When it starts to act, in epochs of its training stage (or steps: see `unit`)."""
    end: float | None = Field(default=None, gt=0)
    """When it stops acting, in epochs; not given: at the end of the stage."""
    update_frequency: float | None = Field(default=None, gt=0)
    """Epochs between two updates; not given: every optimizer step."""
    unit: Unit = "epochs"
    """What all its times are counted in: epochs, or the stage's optimizer steps."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        _check_hooks(cls)
        if not cls.__name__.startswith("_"):
            _register(cls)

    @model_validator(mode="after")
    def _check_window(self) -> Modifier:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end ({self.end:g}) must come after start ({self.start:g})")
        if self.unit == "steps":
            for name in sorted(self.timing - {"unit"}):
                value = getattr(self, name)
                for time in value if isinstance(value, dict) else [value]:
                    if time is not None and time != int(time):
                        raise ValueError(f"{name} is in steps, which are whole, got {time:g}")
        return self

    @classmethod
    def key(cls) -> str:
        """The modifier's name in a recipe: the class name without a trailing `Modifier`."""
        return cls.__name__.removesuffix("Modifier") or cls.__name__

    @property
    def needs_pass(self) -> bool:
        """True: `on_observe` must see every block before `on_block` changes the first one."""
        return False

    # both kinds of stage

    def on_initialize(self, session: Session) -> None:
        """Once, before the first step or block."""

    def on_finalize(self, session: Session) -> None:
        """Once, after the last step or block."""

    # one-shot stages

    def on_observe(self, session: Session, block: Block) -> None:
        """Look at one block, change nothing; called for all blocks first, where `needs_pass` is true."""

    def on_block(self, session: Session, block: Block) -> None:
        """Observe and change one decoder block."""

    # training stages, inside [start, end) only

    def on_start(self, session: Session) -> None:
        """At the first optimizer step of the window."""

    def on_update(self, session: Session) -> None:
        """Every `update_frequency` epochs, also at the start; once in a one-shot stage without `on_block`."""

    def on_end(self, session: Session) -> None:
        """At the first optimizer step after the window, or when the stage ends."""

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        """Return the new total loss (a scalar with its graph)."""
        return loss

    def on_gradients(self, session: Session) -> None:
        """After backward, before the optimizer; gradients are averaged over accumulation."""

    def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer has stepped."""

    # run state

    def state_dict(self) -> dict[str, Any]:
        """The private attributes, for a checkpoint: tensors, numbers, strings, and containers of these."""
        private = self.__pydantic_private__ or {}
        return {name: value for name, value in private.items() if name not in self.transient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def defines(self, hook: str) -> bool:
        """Whether this modifier's class (or a base of it other than Modifier) defines the hook."""
        return getattr(type(self), hook) is not getattr(Modifier, hook)


HOOKS: tuple[str, ...] = tuple(name for name in vars(Modifier) if name.startswith("on_"))


def _check_hooks(cls: type[Modifier]) -> None:
    for name, value in vars(cls).items():
        if not name.startswith("on_") or not inspect.isfunction(value):
            continue
        if name not in HOOKS:
            near = difflib.get_close_matches(name, HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"hooks are {', '.join(HOOKS)}"
            raise ModifierError(
                f"{cls.__module__}.{cls.__qualname__}: {name} is not a hook; {hint}"
            )
        wanted = list(inspect.signature(getattr(Modifier, name)).parameters)
        given = inspect.signature(value).parameters.values()
        if len(given) != len(wanted) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in given):
            raise ModifierError(
                f"{cls.__module__}.{cls.__qualname__}: {name} must take ({', '.join(wanted)}),"
                f" not ({', '.join(p.name for p in given)})"
            )


def _register(cls: type[Modifier]) -> None:
    key = cls.key()
    other = _registry.get(key)
    if other is not None and _place(other) != _place(cls):
        raise ModifierError(
            f"two modifiers are named {key}: {_place(other)} and {_place(cls)}; rename one of them"
        )
    _registry[key] = _registry[f"{key}Modifier"] = cls


def _place(cls: type[Modifier]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def registry() -> dict[str, type[Modifier]]:
    """Every modifier by its recipe key, each with and without the trailing `Modifier`.

    Loads the entry points of group `paring.modifiers` on the first call.
    """
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for entry in importlib.metadata.entry_points(group="paring.modifiers"):
            try:
                entry.load()
            except Exception as error:
                raise ModifierError(
                    f"entry point {entry.name} ({entry.value}) of group paring.modifiers can't be loaded:"
                    f" {type(error).__name__}: {error}; mend or uninstall the package it comes from"
                ) from error
    return dict(_registry)


def load_modifiers(path: str | Path) -> list[type[Modifier]]:
    """Run a Python file (`--use`) and return the modifiers it defines; a second call returns the same.

    A file may define mask structures instead. Raises ModifierError when it is missing, fails, or defines neither.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ModifierError(
            f"{path}: no such file; --use takes a Python file that defines modifiers"
        )
    name = f"paring_use_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ModifierError(f"{path}: not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except ModifierError:
            del sys.modules[name]
            raise
        except Exception as error:
            del sys.modules[name]
            raise ModifierError(f"{path}: {type(error).__name__}: {error}") from error
    found = [cls for key, cls in _registry.items() if cls.__module__ == name and key == cls.key()]
    if not found and not structures_of(name):
        raise ModifierError(f"{path}: defines no subclass of paring.Modifier or MaskStructure")
    return found
