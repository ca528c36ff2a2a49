"""What the calibrated pruners share: at each block, observe the inputs of its Linears, prune, hold the masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, PrivateAttr, model_validator
from torch import nn

from ...errors import ModelError
from ..base import Modifier
from ..hessian import Gram
from ..mask_structure import MaskStructure, MaskStructureName
from .allocation.atp import ATP
from .allocation.auto import Auto, Budget
from .allocation.owl import OWL
from .allocation.profile import Profile, Share, places
from .allocation.sensitivity import Sensitivity
from .layer import Layer as Layer
from .layer import not_gone

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session

AUTO = "auto"


def _known_or_auto(text: str) -> str:
    if text != AUTO:
        try:
            MaskStructure.parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or auto, with a budget") from None
    return text


class _CalibratedPruning(Modifier):
    """A pruner of Linears that looks at X^T X of their inputs; a subclass defines `prune`."""

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The fraction of weights to remove; N:M fixes it itself, and with auto the budget does."""
    mask_structure: Annotated[str, AfterValidator(_known_or_auto)] = "unstructured"
    """unstructured, N:M (N kept of every M inputs), n:16, 1x4, 4x1, 16x1, 2x1, or auto: a choice for each layer."""
    sparsity_profile: Literal["uniform", "owl", "atp", "sensitivity"] = "uniform"
    """How the sparsity is spread over layers: alike, by outliers, rising with depth, or by what each layer loses."""
    owl_m: float = Field(default=5.0, gt=0)
    """owl: a score above this many times the block's mean is an outlier."""
    owl_lmbda: float = Field(default=0.08, ge=0, lt=0.5)
    """owl: how far from the mean sparsity a block may go, halved."""
    atp_spread: float = Field(default=0.1, ge=0, lt=1)
    """atp: the last block's sparsity minus the first's."""
    sensitivity_reach: float = Field(default=0.2, gt=0, lt=1)
    """sensitivity: how far from the mean sparsity a layer may go."""
    importance_samples: int = Field(default=8, ge=1)
    """sensitivity and auto: calibration sequences that tell how much the loss minds each layer's errors."""
    budget: Budget | None = None
    """auto: what the layers may cost together, such as {bytes_per_weight: 0.4} or {speed: 2.0} (times dense int8)."""
    candidates: list[MaskStructureName] = Field(default=["unstructured", "1x4"], min_length=1)
    """auto: the patterns to choose from, besides dense."""

    _found: dict[str, Any] = PrivateAttr(default_factory=dict)
    _plan: dict[str, list[Any]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_sparsity(self) -> _CalibratedPruning:
        if self.mask_structure == AUTO:
            if self.budget is None:
                raise ValueError("mask_structure auto needs a budget, such as budget: {speed: 2.0}")
            if self.sparsity is not None:
                raise ValueError("with mask_structure auto the budget decides; leave sparsity out")
            if self.sparsity_profile != "uniform":
                raise ValueError(
                    "mask_structure auto spreads the sparsity itself; leave sparsity_profile out"
                )
            return self
        if self.budget is not None:
            raise ValueError("budget goes with mask_structure: auto")
        fixed = MaskStructure.parse(self.mask_structure).sparsity
        if fixed is None and self.sparsity is None:
            raise ValueError("sparsity is missing, such as sparsity: 0.5")
        if fixed is not None and self.sparsity not in (None, fixed):
            raise ValueError(
                f"mask_structure {self.mask_structure} is {fixed:g} sparse, but sparsity is {self.sparsity:g};"
                " leave sparsity out"
            )
        if fixed is not None and self.sparsity_profile != "uniform":
            raise ValueError(
                f"sparsity_profile {self.sparsity_profile} gives layers different sparsities, but mask_structure"
                f" {self.mask_structure} fixes it; use n:16, or mask_structure: auto with these as candidates"
            )
        return self

    @property
    def needs_pass(self) -> bool:
        profile = self._profile()
        return profile is not None and profile.needs_pass

    @property
    def weighs_outputs(self) -> bool:
        """Whether `prune` weighs errors by how much the loss minds each output; trials for a profile do the same."""
        return False

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prune Linears that share one input, of which `gram` is X^T X.

        Returns each new weight f32 [out, in] with its mask (True = kept). `notes` goes into the report.
        """
        raise NotImplementedError

    def on_initialize(self, session: Session) -> None:
        self._found, self._plan = {}, {}

    def on_observe(self, session: Session, block: Block) -> None:
        profile = self._profile()
        assert profile is not None
        linears = block.linears(self.targets, self.ignore)
        if linears:
            everywhere = places(session, self.targets, self.ignore)
            profile.observe(session, block, linears, everywhere, self._found)

    def on_block(self, session: Session, block: Block) -> None:
        self._settle(session)
        linears = block.linears(self.targets, self.ignore)
        for name in linears:
            if name in session.quantization:
                raise ModelError(
                    f"{session.label(self)}: {name} is quantized already, and new weights would leave its integer grid;"
                    " put pruning before quantization"
                )
        tasks = {name: self._task(session, name, linear) for name, linear in linears.items()}
        for name, task in tasks.items():
            task.structure.check(name, tuple(task.weight.shape))
        groups = [(names, Gram()) for names in block.shared_inputs(linears)]
        block.run({names[0]: gram.add for names, gram in groups})
        found = session.section(self).setdefault("layers", {})
        lost = []
        for names, gram in groups:
            notes: dict[str, Any] = {}
            results = self.prune(gram, [tasks[name] for name in names], notes)
            for name, (after, mask) in zip(names, results, strict=True):
                before = tasks[name].weight
                mask = mask & tasks[name].kept
                after = after.masked_fill(~mask, 0)
                error = gram.relative_error(
                    before, after
                )  # first: `before` may be the weight itself
                linears[name].weight.data.copy_(after)
                session.masks.hold(f"{name}.weight", mask)
                sparsity = 1 - int(mask.sum()) / mask.numel()
                found[name] = {"sparsity": sparsity, "error": error, **notes}
                if self.mask_structure == AUTO:
                    found[name]["mask_structure"] = tasks[name].structure.text
                lost.append(error)
        if lost:
            session.block_note = f"error {sum(lost) / len(lost):.3g}"

    def _settle(self, session: Session) -> None:
        """Decide every layer's share, before the first block is changed; a resumed run has it in its state."""
        profile = self._profile()
        if profile is None or self._plan:
            return
        everywhere = places(session, self.targets, self.ignore)
        asked = 0.0 if self.mask_structure == AUTO else self._share("").sparsity
        plan = profile.allocate(everywhere, self._found, self.mask_structure, asked)
        self._plan = {name: list(share) for name, share in plan.items()}
        self._found = {}  # served its purpose: the state need not carry it on
        session.section(self)["sparsity_profile"] = self.sparsity_profile

    def _task(self, session: Session, name: str, linear: nn.Linear) -> Layer:
        weight = linear.weight.detach().float()
        return self.layer(name, weight, not_gone(session, name, weight))

    def layer(self, name: str, weight: torch.Tensor, kept: torch.Tensor) -> Layer:
        """What this modifier's settings ask of one Linear."""
        share = self._share(name)
        return Layer(name, weight, kept, MaskStructure.parse(share.structure), share.sparsity)

    def _share(self, name: str) -> Share:
        if name in self._plan:
            return Share(*self._plan[name])
        fixed = MaskStructure.parse(self.mask_structure).sparsity
        sparsity = self.sparsity if fixed is None else fixed
        assert sparsity is not None
        return Share(self.mask_structure, sparsity)

    def _profile(self) -> Profile | None:
        """None: every layer gets what the recipe says."""
        if self.mask_structure == AUTO:
            assert self.budget is not None
            return Auto(self.budget, self.candidates, self.importance_samples, self.weighs_outputs)
        if self.sparsity_profile == "owl":
            return OWL(self.owl_m, self.owl_lmbda)
        if self.sparsity_profile == "atp":
            return ATP(self.atp_spread)
        if self.sparsity_profile == "sensitivity":
            assert self.sparsity is not None
            return Sensitivity(
                self.mask_structure,
                self.sparsity,
                self.sensitivity_reach,
                self.importance_samples,
                self.weighs_outputs,
            )
        return None
