"""What the quantizing modifiers share: which scheme each Linear gets, and which Linears stay in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from ...errors import ModelError
from ..base import Modifier
from .cache import calibrate
from .layer import LayerQuantization, attach
from .schemes import ConfigGroup, InputObserver, Preset, WeightObserver, preset
from .skip import Skip

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class _SchemeQuantization(Modifier):
    """A modifier that quantizes Linears by scheme; a subclass defines `quantize`."""

    scheme: Preset | None = None
    """The scheme of all targets; W8A8 unless config_groups are given."""
    config_groups: dict[str, ConfigGroup] | None = None
    """Named schemes for their own targets; the first that means a layer decides, before `scheme`."""
    dynamic: bool = True
    """Of `scheme`'s int8 inputs: a scale per token (true), or one from calibration (false)."""
    group_size: int | None = Field(default=None, ge=8)
    """Of `scheme`'s weights: inputs that share a scale; 4-bit: 128 if not given."""
    observer: WeightObserver = "minmax"
    """Of `scheme`'s weights: minmax, percentile, mse, or imatrix_mse, which weights columns by their input."""
    input_observer: InputObserver = "minmax"
    """Of `scheme`'s static inputs: minmax, percentile or mse."""
    skip: Skip | None = None
    """Layers to leave in floating point, chosen by measuring."""
    kv_cache: Literal["int8"] | None = None
    """int8: keys and values too, a static scale for each key/value head, calibrated in a one-shot stage."""

    _scores: dict[str, float] = PrivateAttr(default_factory=dict)
    _skipped: list[str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_scheme(self) -> _SchemeQuantization:
        of_inputs = self.input_observer != "minmax"
        observes = self.observer != type(self).model_fields["observer"].default or of_inputs
        own = not self.dynamic or self.group_size or observes
        if self.scheme is None and self.config_groups and own:
            raise ValueError(
                "dynamic, group_size and the observers belong to scheme; config_groups have their own"
            )
        if of_inputs and self.dynamic:
            raise ValueError("input_observer calibrates static inputs; give dynamic: false as well")
        return self

    @property
    def needs_pass(self) -> bool:
        return self.skip is not None

    def on_initialize(self, session: Session) -> None:
        self._scores, self._skipped = {}, None

    def on_observe(self, session: Session, block: Block) -> None:
        assert self.skip is not None  # only then there is a pass
        self._scores |= self.skip.measure(block, self._schemes(session, block))

    def on_block(self, session: Session, block: Block) -> None:
        skipped = self._choose_skipped(session)
        schemes = {n: s for n, s in self._schemes(session, block).items() if n not in skipped}
        self.quantize(session, block, schemes)
        if self.kv_cache:
            for name, cache in calibrate(block).items():
                session.caches[name] = cache
                cache.attach()
        counts = session.section(self).setdefault("layers", {})
        for scheme in schemes.values():
            counts[scheme.name] = counts.get(scheme.name, 0) + 1

    def quantize(self, session: Session, block: Block, schemes: Mapping[str, ConfigGroup]) -> None:
        """Put the Linears named on their grids and `keep` each."""
        raise NotImplementedError

    @staticmethod
    def keep(session: Session, name: str, layer: LayerQuantization) -> None:
        """From now on the Linear is quantized: its input is rounded as well, if the scheme says so."""
        session.quantization[name] = layer
        attach(layer)

    def _schemes(self, session: Session, block: Block) -> dict[str, ConfigGroup]:
        """The scheme of each Linear of the block that is to be quantized, in the order of the modules."""
        groups = list((self.config_groups or {}).values())
        if self.scheme is not None or not groups:
            groups.append(
                preset(
                    self.scheme or "W8A8",
                    self.targets,
                    dynamic=self.dynamic,
                    group_size=self.group_size,
                    observer=self.observer,
                    input_observer=self.input_observer,
                )
            )
        found: dict[str, ConfigGroup] = {}
        for group in groups:
            for name in block.linears(group.targets, self.ignore):
                found.setdefault(name, group)
        for name in found:
            if name in session.quantization:
                raise ModelError(f"{name} is quantized already; put it in `ignore`")
        order = [f"{block.name}.{name}" for name, _ in block.module.named_modules()]
        return {name: found[name] for name in order if name in found}

    def _choose_skipped(self, session: Session) -> list[str]:
        if self._skipped is None:
            sizes = {name: linear_of(session, name).weight.numel() for name in self._scores}
            section = session.section(self)
            self._skipped = self.skip.choose(self._scores, sizes, section) if self.skip else []
        return self._skipped


def linear_of(session: Session, name: str) -> nn.Linear:
    """The Linear of that name."""
    linear = session.model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
