"""What every way to spread sparsity over layers has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from ...blocks import find_blocks
from .budget import level

if TYPE_CHECKING:
    from ...blocks import Block
    from ...session import Session


@dataclass(frozen=True)
class Place:
    """A Linear as an allocation sees it."""

    block: int
    """The decoder block it is in, counted from 0."""
    size: int
    """Its number of weights."""
    columns: int
    """Its number of inputs."""


class Share(NamedTuple):
    """What a layer is to become."""

    structure: str
    sparsity: float


class Profile(ABC):
    """Gives every layer a sparsity, so that all layers together have the sparsity asked for."""

    needs_pass: ClassVar[bool] = False
    """True: `observe` must see every block, unchanged, before `allocate`."""

    def observe(
        self,
        session: Session,
        block: Block,
        linears: dict[str, nn.Linear],
        places: dict[str, Place],
        found: dict[str, Any],
    ) -> None:
        """Add to `found` what `allocate` will need of one block: tensors, numbers, and lists and dicts of these."""
        raise NotImplementedError(f"{type(self).__name__} needs a pass, but does not observe")

    @abstractmethod
    def allocate(
        self, places: dict[str, Place], found: dict[str, Any], structure: str, sparsity: float
    ) -> dict[str, Share]:
        """The share of each layer; `structure` and `sparsity` are those of the recipe."""


def places(session: Session, targets: list[str], ignore: list[str]) -> dict[str, Place]:
    """The Linears inside decoder blocks that are meant."""
    found = {}
    prefixes = [f"{name}." for name, _ in find_blocks(session.model)]
    for name, module in session.modules(targets, ignore):
        inside = [index for index, prefix in enumerate(prefixes) if name.startswith(prefix)]
        if inside and isinstance(module, nn.Linear):
            found[name] = Place(inside[0], module.weight.numel(), module.in_features)
    return found


def shares(
    wanted: dict[str, float], places: dict[str, Place], structure: str, sparsity: float
) -> dict[str, Share]:
    """The shares with the sparsities `wanted`, all shifted alike so that together they have `sparsity`."""
    sizes = {name: place.size for name, place in places.items()}
    return {name: Share(structure, value) for name, value in level(wanted, sizes, sparsity).items()}
