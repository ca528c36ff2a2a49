"""One-shot stages: modifiers in order, in passes over the decoder blocks, resumable at the last finished block.

Neighbouring modifiers with `on_block` share a pass: at each block they act one after the other, then the block's
compressed output becomes the next block's input. A modifier with `needs_pass` starts a new pass, before which
`on_observe` sees every block; a modifier with only `on_update` acts on the whole model, between passes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import LawError, TargetError
from ..progress import Progress
from .base import Modifier
from .blocks import Block, Stream, find_blocks
from .resume import Journal

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True)
class Walk:
    """One step of a stage: the whole model once, or a walk over its blocks."""

    kind: Literal["model", "observe", "blocks"]
    modifiers: tuple[Modifier, ...]

    @property
    def needs_reference(self) -> bool:
        return self.kind == "blocks" and any(m.needs_reference for m in self.modifiers)


def plan(modifiers: list[Modifier]) -> list[Walk]:
    """The walks that a list of modifiers needs, in order."""
    walks: list[Walk] = []
    for modifier in modifiers:
        if modifier.defines("on_block"):
            if modifier.needs_pass:
                walks += [Walk("observe", (modifier,)), Walk("blocks", (modifier,))]
            elif walks and walks[-1].kind == "blocks":
                walks[-1] = Walk("blocks", (*walks[-1].modifiers, modifier))
            else:
                walks.append(Walk("blocks", (modifier,)))
        elif modifier.defines("on_update"):
            walks.append(Walk("model", (modifier,)))
    return walks


def run(
    session: Session,
    calibration: torch.Tensor | None,
    progress: Progress | None,
    resume_dir: Path | None,
) -> None:
    """See Session.run_oneshot."""
    walks = plan(session.modifiers)
    journal = Journal(resume_dir, _fingerprint(session, calibration)) if resume_dir else None
    for modifier in session.modifiers:
        session.call(modifier, "on_initialize")
        if modifier.defines("on_block"):
            _check_targets(session, modifier)
    done = journal.restore_walks(session) if journal else (0, 0)
    for number, walk in enumerate(walks):
        if number < done[0]:
            continue
        if walk.kind == "model":
            for modifier in walk.modifiers:
                session.call(modifier, "on_update")
            if journal:
                journal.save(session, number, None)
            continue
        first = done[1] if number == done[0] else 0
        stream = Stream(session.model, calibration, walk.needs_reference, resume_dir)
        if journal and first:
            stream.advance_reference(first - 1)  # through blocks that are as they were
            journal.restore_blocks(session)
        total = len(stream.blocks)
        label = _label(session, walk)
        for index in range(first, total):
            if progress:
                progress(label, index, total)
            block = stream.block(index)
            stream.advance_reference(index)
            note = _visit(session, walk, block)
            if journal:
                journal.save(session, number, block)
            if progress:
                progress(label, index + 1, total, note)
    for modifier in session.modifiers:
        session.call(modifier, "on_finalize")


def _visit(session: Session, walk: Walk, block: Block) -> str:
    """Let the walk's modifiers act on one block; returns the last note any of them left for the progress line."""
    prefix = f"{block.name}."
    session.block_note = ""
    for modifier in walk.modifiers:
        block.reader = session.label(modifier)
        if walk.kind == "observe":
            session.call(modifier, "on_observe", block, prefix=prefix)
            continue
        if not modifier.preserves_function:
            session.call(modifier, "on_block", block, prefix=prefix)
            continue
        before = block.outputs(batches=1)[0]
        session.call(modifier, "on_block", block, prefix=prefix)
        _check_function(session, modifier, block, before)
    return session.block_note


def _check_function(
    session: Session, modifier: Modifier, block: Block, before: torch.Tensor
) -> None:
    """Law: the block computes the same as before, within float error.

    Each token's error is compared with its norm. A sum of n terms errs by about sqrt(n) * eps relative to the norms of
    its terms; a block chains some ten of them, and 32 leaves room for cancellation in the residual stream.
    """
    after = block.outputs(batches=1)[0]
    error = (after - before).float().norm(dim=-1)
    norm = before.float().norm(dim=-1)
    tolerance = 32 * torch.finfo(before.dtype).eps * before.shape[-1] ** 0.5
    worst = float((error / norm.clamp_min(torch.finfo(torch.float32).tiny)).max())
    if not worst <= tolerance:
        raise LawError(
            f"{session.label(modifier)}.on_block changed what {block.name} computes: relative error {worst:.2g},"
            f" allowed {tolerance:.2g}"
        )


def _check_targets(session: Session, modifier: Modifier) -> None:
    """A block-wise modifier must mean something inside the blocks; what it means outside goes into the report."""
    names = [name for name, _ in session.modules(modifier.targets, modifier.ignore)]
    prefixes = tuple(f"{name}." for name, _ in find_blocks(session.model))
    outside = [name for name in names if not name.startswith(prefixes)]
    if len(outside) == len(names):
        raise TargetError(
            f"{session.label(modifier)} acts inside decoder blocks, but its targets mean only"
            f" {', '.join(outside[:5]) or 'nothing'}"
        )
    if outside:
        session.section(modifier)["left_alone_outside_blocks"] = outside


def _label(session: Session, walk: Walk) -> str:
    names = " + ".join(session.label(modifier) for modifier in walk.modifiers)
    return f"{names} (observing)" if walk.kind == "observe" else names


def _fingerprint(session: Session, calibration: torch.Tensor | None) -> str:
    """What a run's result depends on: modifiers with their settings, data, seed, and the weights it starts from."""
    digest = hashlib.sha256()
    settings: list[Any] = [(m.key(), m.model_dump(mode="json")) for m in session.modifiers]
    digest.update(json.dumps([settings, session.seed], sort_keys=True).encode())
    if calibration is not None:
        digest.update(calibration.contiguous().numpy().tobytes())
    for name, parameter in session.model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 1024)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
