"""LLM-Pruner: remove whole attention heads and MLP channels, so that the dense model is smaller everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import nn

from ....errors import DataError, LawError, ModelError
from ...base import Modifier
from ...blocks import Stream, find_blocks
from ...hessian import Gram
from ...sizes import shapes, twin
from .compensation import compensate
from .dependency import Unit, find_dependencies
from .importance import Importance, importance
from .removal import Choice, HeadGroup, choose, remove, staying

if TYPE_CHECKING:
    from ...session import Session

TOLERANCE = 1e-3  # of the logits' norm: removing differs from zeroing by the order of sums only


class LLMPruner(Modifier):
    """LLM-Pruner (Ma et al. 2023, arXiv 2305.11627): structured pruning by dependency groups and Taylor importance.

    Removes, from every block, the attention heads and MLP channels whose weights matter least to the loss: rows of the
    Linears that make them and columns of the one that reads them. The result is a smaller dense model with a smaller
    config, for `transformers` and the engine alike. Groups are found by watching a forward. Every block loses equally
    many, because a config has one number for all; importance says which. (The paper spares the first four and last two
    blocks, and needs its own loader.) The paper's recovery by LoRA is no part of it: put a training stage behind it.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    sparsity: float = Field(default=0.2, ge=0, lt=1)
    """The share of heads and of channels to remove, to the nearest that the model's config can say."""
    head_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The share of heads, if it is not `sparsity`; 0 keeps all."""
    channel_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The share of MLP channels, if it is not `sparsity`; 0 keeps all."""
    importance: Importance = "taylor_second"
    """taylor_first |w g|, taylor_second w^2 g^2, taylor_mix |w g - w^2 g^2 / 2|, or magnitude w^2; a group's sum."""
    samples: int | None = Field(default=None, ge=1)
    """How many of the calibration sequences give gradients; not given: all."""
    head_group: HeadGroup = "kv"
    """Under grouped-query attention: `kv`, a key-value head goes with its query heads; `query`, as many query heads of
    each key-value head go."""
    multiple_of: int = Field(default=64, ge=1)
    """Channels kept are a multiple of this, for kernels and for groups of 4-bit weights."""
    update_weights: bool = True
    """Let the columns that stay make up for those that go, by least squares on the layer's inputs."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the inputs' X X^T for the update, as a fraction of its mean."""

    def on_update(self, session: Session) -> None:
        model, found = session.model, session.section(self)
        choices = self._choices(session)
        gone = self._least_important(session, choices)
        before = sum(parameter.numel() for parameter in model.parameters())
        self._zero(session, choices, gone)
        tokens = self._tokens(session)[:1]
        zeroed = model(tokens, use_cache=False).logits
        changes = {name: value for choice in choices for name, value in choice.changes.items()}
        units = {block: [u for part in parts for u in part] for block, parts in gone.items()}
        remove(model, session.masks, units, changes)
        difference = (model(tokens, use_cache=False).logits - zeroed).norm() / zeroed.norm()
        if not float(difference) <= TOLERANCE:
            raise LawError(f"removing changed the logits by {float(difference):.2g} of their norm")
        found["parameters"] = {
            "before": before,
            "after": sum(parameter.numel() for parameter in model.parameters()),
        }

    def _choices(self, session: Session) -> list[Choice]:
        """What to remove of each kind, in the order in which a block computes; also into the report."""
        if shapes(session.model) != shapes(twin(session.model, {})):
            raise ModelError(
                f"{session.label(self)}: the model's shapes are not those that its config says; mend the config first"
            )
        removed = session.section(self).setdefault("removed", {})
        choices = []
        for dependency in find_dependencies(session.model, self._meant(session)):
            own = self.head_sparsity if dependency.kind == "heads" else self.channel_sparsity
            share = self.sparsity if own is None else own
            choice = choose(session.model, dependency, share, self.head_group, self.multiple_of)
            removed[dependency.consumer] = {
                "kind": dependency.kind,
                "linears": dependency.linears,
                "share_asked": share,
                "share": choice.removed / choice.size,
                **choice.changes,
            }
            if choice.removed:
                choices.append(choice)
        if not choices:
            raise ModelError(
                f"{session.label(self)} would remove nothing: no share of the heads or channels meant rounds to one;"
                " raise sparsity, or lower multiple_of"
            )
        return choices

    def _meant(self, session: Session) -> set[str]:
        """The Linears meant, by their names inside a block: the same in every block."""
        meant = {name for name, _ in session.modules(self.targets, self.ignore)}
        blocks = [name for name, _ in find_blocks(session.model)]
        inside = [{n[len(b) + 1 :] for n in meant if n.startswith(f"{b}.")} for b in blocks]
        if any(names != inside[0] for names in inside):
            raise ModelError(
                f"{session.label(self)}: targets and ignore must mean the same Linears in every block: the config has"
                " one number of heads and channels for all"
            )
        quantized = [*(n for n in session.quantization if n in meant), *session.caches]
        if quantized:
            raise ModelError(
                f"{session.label(self)}: {quantized[0]} is quantized already; remove heads and channels first"
            )
        return inside[0]

    def _least_important(
        self, session: Session, choices: list[Choice]
    ) -> dict[str, list[list[Unit]]]:
        """By block and choice, the units to remove: those whose importance, summed over their weights, is least."""
        model = session.model
        names = {name for choice in choices for name in choice.dependency.linears}
        linears: dict[str, nn.Linear] = {}
        for block, module in find_blocks(model):
            for name in sorted(names):
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                linears[f"{block}.{name}"] = linear
        tokens = None
        if self.importance != "magnitude":
            tokens = self._calibration(session)[: self.samples]

        def seen(count: int) -> None:
            session.tell(self, "gradients", count, 0 if tokens is None else len(tokens))

        cost = importance(model, linears, self.importance, tokens, seen)
        rows = {name: matrix.sum(dim=1) for name, matrix in cost.items()}
        columns = {name: matrix.sum(dim=0) for name, matrix in cost.items()}
        gone: dict[str, list[list[Unit]]] = {}
        for block, _ in find_blocks(model):
            gone[block] = []
            for choice in choices:
                least: list[Unit] = []
                for pool in choice.pools:
                    scores = torch.stack([_score(f"{block}.", u, rows, columns) for u in pool])
                    order = scores.argsort(stable=True)[: choice.removed]
                    least += [pool[int(index)] for index in order]
                gone[block].append(least)
        return gone

    def _zero(
        self, session: Session, choices: list[Choice], gone: dict[str, list[list[Unit]]]
    ) -> None:
        """Set the columns that go to zero, block by block; with `update_weights` the others make up for them."""
        calibration = self._calibration(session) if self.update_weights else None
        stream = Stream(session.model, calibration)
        errors = session.section(self).setdefault("errors", {})
        for index in range(len(stream.blocks)):
            block = stream.block(index)
            for choice, units in zip(choices, gone[block.name], strict=True):
                name = choice.dependency.consumer
                linear = block.module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                kept = staying({name: linear}, [Unit({}, u.columns) for u in units])[1][name]
                kept = kept.to(linear.weight.device)
                full = f"{block.name}.{name}"
                before = linear.weight.detach().float()
                after = torch.zeros_like(before).index_copy_(1, kept, before[:, kept])
                if self.update_weights:
                    gram = Gram()
                    block.run({full: gram.add})
                    plain = gram.relative_error(before, after)
                    mask = session.masks.get(f"{full}.weight")
                    after = compensate(before, gram.matrix, kept, self.dampening_frac, mask)
                    errors[full] = {"removed": plain, "updated": gram.relative_error(before, after)}
                linear.weight.data.copy_(after)
            session.tell(self, "blocks", index + 1, len(stream.blocks))

    def _calibration(self, session: Session) -> torch.Tensor:
        if session.calibration is None:
            raise DataError(
                f"{session.label(self)} needs calibration data; give the stage `data:`, or set importance: magnitude"
                " and update_weights: false"
            )
        return session.calibration

    def _tokens(self, session: Session) -> torch.Tensor:
        """Some tokens to compare logits on, [samples, length]."""
        if session.calibration is not None:
            return session.calibration.to(session.device)
        vocabulary = session.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return torch.arange(64, device=session.device)[None] % int(vocabulary)


def _score(
    prefix: str, unit: Unit, rows: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]
) -> torch.Tensor:
    parts = [rows[prefix + name][index].sum() for name, index in unit.rows.items()]
    parts += [columns[prefix + name][index].sum() for name, index in unit.columns.items()]
    return torch.stack(parts).sum()
