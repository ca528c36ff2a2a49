"""Block reconstruction: train what is left of a compressed block until it gives what the dense model gave there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..base import Modifier
from .latent import LatentWeight

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


@dataclass(frozen=True)
class Batch:
    """Some sequences of the calibration: which rows of which batch of the block's inputs."""

    index: int
    rows: slice


@dataclass
class Trained:
    """One tensor that is trained, the zeros it must keep, and its learning rate."""

    value: torch.Tensor
    zeros: torch.Tensor | None
    rate: float


class BlockReconstruction(Modifier):
    """Train a compressed block, its zeros held, towards the dense block's output (EBFT, Guo et al., arXiv 2402.12419).

    Stands after the pruning and quantizing modifiers of the same pass. The block gets its inputs from the compressed
    blocks before it and is to give what it gave in the model as the pass found it, so that later blocks make up for
    the errors of earlier ones. The loss is the squared error of each token's hidden state relative to its norm: a few
    tokens with huge activations (Sun et al. 2024, arXiv 2402.17762) would own an absolute one. Adam, with a linear
    warm-up and a cosine decay; some sequences are held out, and the best state on these is kept. A pass of its own has
    nothing to reconstruct: the report then shows errors of zero.

    Quantized Linears train a latent weight and their scales through the rounding (Block-AP of EfficientQAT, Chen et
    al., arXiv 2407.11062) and end on their grid.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})
    needs_reference: ClassVar[bool] = True

    epochs: int = Field(default=4, ge=1)
    """Passes over the calibration sequences."""
    batch_size: Literal[1, 2, 4] = 1
    """Sequences per step of Adam."""
    learning_rate: float = Field(default=0.012, gt=0)
    """The highest learning rate, relative to the root mean square of each tensor's own values."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """The fraction of all steps over which the learning rate rises."""
    held_out: int = Field(default=4, ge=0)
    """Calibration sequences that are not trained on but choose the epoch that is kept; at most a quarter of all."""
    norms: bool = True
    """Train the block's other parameters too, such as its norms; false: only its targets."""
    scale_learning_rate: float = Field(default=1e-3, ge=0)
    """Of quantized Linears: the learning rate of the scales, relative to the scale; 0 keeps them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrix products compute in while training; auto: bfloat16 where the processor has units for it."""

    def on_block(self, session: Session, block: Block) -> None:
        fit = _Fit(self, session, block)
        if not fit.trained:
            return
        before = fit.held_out_error()
        fit.run()
        after = fit.held_out_error()
        section = session.section(self)
        section["dtype"] = str(fit.dtype).removeprefix("torch.")
        section.setdefault("blocks", {})[block.name] = {"before": before, "after": after}
        session.block_note = f"block error {before:.3g} -> {after:.3g}"


class _Fit:
    """The training of one block."""

    def __init__(self, settings: BlockReconstruction, session: Session, block: Block) -> None:
        self.settings = settings
        self.block = block
        self.inputs = block.inputs
        self.targets = block.reference_outputs()
        self.dtype = _dtype(settings.dtype, self.inputs[0].device)
        self.latent: list[LatentWeight] = []
        self.trained = list(self._trained(session))
        self.generator = torch.Generator().manual_seed(session.seed * 1009 + block.index)
        batches = [
            Batch(index, slice(first, min(first + settings.batch_size, hidden.shape[0])))
            for index, hidden in enumerate(self.inputs)
            for first in range(0, hidden.shape[0], settings.batch_size)
        ]
        held = min(settings.held_out // settings.batch_size, len(batches) // 4)
        self.batches, self.held = batches[: len(batches) - held], batches[len(batches) - held :]

    def _trained(self, session: Session) -> Iterator[Trained]:
        relative = self.settings.learning_rate
        linears = self.block.linears(self.settings.targets, self.settings.ignore)
        for name, linear in linears.items():
            mask = session.masks.get(f"{name}.weight")
            zeros = None if mask is None else ~mask
            if name in session.quantization:
                latent = LatentWeight(session.quantization[name], mask)
                self.latent.append(latent)
                yield Trained(latent.weight, zeros, relative * _size(latent.weight))
                if self.settings.scale_learning_rate:
                    yield Trained(latent.log_factor, None, self.settings.scale_learning_rate)
            else:
                yield Trained(linear.weight, zeros, relative * _size(linear.weight))
            if linear.bias is not None:
                yield Trained(linear.bias, None, relative * _size(linear.bias))
        others = {
            id(parameter)
            for module in self.block.module.modules()
            if isinstance(module, nn.Linear)
            for parameter in module.parameters()
        }
        for parameter in self.block.module.parameters() if self.settings.norms and linears else ():
            if id(parameter) not in others:
                yield Trained(parameter, None, relative * _size(parameter))

    def run(self) -> None:
        """Train; the block ends in the best state on the held-out sequences, or the last if there are none."""
        for latent in self.latent:
            latent.attach()
        try:
            self._train()
        finally:
            for latent in self.latent:
                latent.detach()
        for latent in self.latent:
            latent.settle()

    def _train(self) -> None:
        values = [trained.value for trained in self.trained]
        optimizer = torch.optim.Adam(
            [{"params": [trained.value], "lr": trained.rate} for trained in self.trained],
            betas=(0.9, 0.95),
            fused=True,
        )
        best, kept = math.inf, [value.detach().clone() for value in values]
        if self.held:
            best = self.held_out_error()
        total = self.settings.epochs * len(self.batches)
        step = 0
        for _ in range(self.settings.epochs):
            for index in torch.randperm(len(self.batches), generator=self.generator).tolist():
                factor = self._schedule(step, total)
                for group, trained in zip(optimizer.param_groups, self.trained, strict=True):
                    group["lr"] = trained.rate * factor
                self._step(self.batches[index], values, optimizer)
                step += 1
            if not self.held:
                continue
            error = self.held_out_error()
            if error < best:
                best = error
                for copy, value in zip(kept, values, strict=True):
                    copy.copy_(value)
        if self.held:
            for copy, value in zip(kept, values, strict=True):
                value.data.copy_(copy)

    def _step(
        self, batch: Batch, values: list[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        with torch.enable_grad():
            loss = self._error(batch)
            gradients = torch.autograd.grad(loss, values, allow_unused=True)
        for trained, gradient in zip(self.trained, gradients, strict=True):
            if trained.zeros is not None and gradient is not None:
                gradient.masked_fill_(trained.zeros, 0)  # so Adam's moments stay 0 there too
            trained.value.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    def _schedule(self, step: int, total: int) -> float:
        warmup = max(1, round(total * self.settings.warmup_ratio))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _error(self, batch: Batch) -> torch.Tensor:
        """The mean over tokens of the squared relative error of the block's output."""
        hidden, target = self.inputs[batch.index], self.targets[batch.index][batch.rows].float()
        with self._autocast():
            output = self.block.compute(hidden[batch.rows], batch.index, batch.rows)
        error = (output.float() - target).square().sum(dim=-1)
        norm = target.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (error / norm).mean()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """The mean loss on the held-out sequences (on all if none are), in training precision."""
        batches = self.held or self.batches
        return sum(float(self._error(batch)) for batch in batches) / len(batches)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.dtype is torch.bfloat16:
            return torch.autocast(self.inputs[0].device.type, torch.bfloat16)
        return nullcontext()


def _size(value: torch.Tensor) -> float:
    """The root mean square of the values that are not zero; 1 if all are."""
    kept = value.detach()[value.detach() != 0].float()
    return float(kept.square().mean().sqrt()) if kept.numel() else 1.0


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cpu":
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has_units = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if has_units else torch.float32
