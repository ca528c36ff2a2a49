"""A session: one stage of a recipe over one model. It keeps the clock, calls the hooks, and asserts the laws.

A one-shot stage is `run_oneshot(calibration)`. A training stage is driven by a loop, the Trainer's or a user's own:

    session.begin(steps_per_epoch, total_steps)
    for batch in loader:                       # one optimizer step
        session.before_step()
        outputs = model(**batch)
        session.loss(outputs.loss, batch, outputs).backward()
        session.before_optimizer(optimizer)
        optimizer.step(); optimizer.zero_grad()
        session.after_step(optimizer)
    session.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import LawError, ModelError
from ..progress import Progress
from . import oneshot
from .base import Modifier
from .masks import Masks
from .precision import fast_float32
from .quantization.cache import CacheQuantization
from .quantization.layer import LayerQuantization, attach, detach
from .schedule import Window, per_unit, to_step
from .targets import select
from .training.trainable_params import TrainableParams


class Session:
    """One stage. `masks` and `quantization` come from the stage before and are carried on, changed in place.

    `load_teacher(reference)` returns a model in evaluation mode; the pipeline sets it where a recipe distils.
    """

    def __init__(
        self,
        model: nn.Module,
        modifiers: Sequence[Modifier] = (),
        *,
        tokenizer: Any = None,
        seed: int = 0,
        masks: Masks | None = None,
        quantization: dict[str, LayerQuantization] | None = None,
        caches: dict[str, CacheQuantization] | None = None,
        load_teacher: Callable[[str], nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.modifiers = list(modifiers)
        self.tokenizer = tokenizer
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = Masks() if masks is None else masks
        self.quantization = {} if quantization is None else quantization
        self.caches = {} if caches is None else caches
        self.load_teacher = load_teacher
        self.report: dict[str, dict[str, Any]] = {}
        self.teachers: dict[str, nn.Module] = {}
        self.per_batch: dict[
            str, Any
        ] = {}  # shared between the on_loss hooks of one batch, then cleared
        self.optimizer: torch.optim.Optimizer | None = None  # while `on_gradients` hooks run
        self.run: Literal["oneshot", "train"] = "oneshot"
        self.calibration: torch.Tensor | None = None  # a one-shot stage's tokens [samples, length]
        self.step = 0
        self.steps_per_epoch = 0
        self.total_steps = 0
        self.block_note = (
            ""  # what a modifier wants said on the progress line, e.g. the block's error
        )
        self._windows: list[Window] = []
        self._phase: list[Literal["waiting", "active", "ended"]] = ["waiting"] * len(self.modifiers)
        self._logs: dict[str, tuple[float, int]] = {}
        self._progress: Progress | None = None
        for layer in self.quantization.values():
            attach(layer)
        for cache in self.caches.values():
            cache.attach()

    # what modifiers read and write

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> None:
        """Move the model with its held zeros and scales, e.g. to a GPU for a one-shot stage, and back."""
        device = torch.device(device)
        self.model.to(device)
        self.masks.to(device)
        for layer in self.quantization.values():
            layer.to(device)
        for cache in self.caches.values():
            cache.to(device)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def modules(
        self, targets: Sequence[str], ignore: Sequence[str] = ()
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules meant (see targets.py). TargetError when a pattern matches nothing."""
        return select(self.model, targets, ignore)

    def weights(
        self, targets: Sequence[str], ignore: Sequence[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`<module>.weight` of the modules meant, where it is a matrix; detached, to be changed in place."""
        for name, module in self.modules(targets, ignore):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
                yield f"{name}.weight", weight.detach()

    def progress(self, modifier: Modifier) -> float:
        """How far the clock is through a modifier's window, 0 to 1; 1 in a one-shot stage."""
        if self.run == "oneshot":
            return 1.0
        return self._windows[self._index(modifier)].progress(self.step)

    def reached(self, modifier: Modifier, time: float, ahead: int = 0) -> bool:
        """Whether the clock, or `ahead` steps later, is at or after a time, which is in the modifier's `unit`."""
        return self.step + ahead >= to_step(time, per_unit(modifier.unit, self.steps_per_epoch))

    def is_active(self, modifier: Modifier) -> bool:
        """Whether the clock is inside the modifier's [start, end)."""
        return self._phase[self._index(modifier)] == "active"

    def log(self, name: str, value: float | torch.Tensor) -> None:
        """Log a number; `take_logs` gives the mean since it was last called."""
        total, count = self._logs.get(name, (0.0, 0))
        self._logs[name] = (total + float(value), count + 1)

    def take_logs(self) -> dict[str, float]:
        """The mean of every logged number since the last call."""
        logs, self._logs = self._logs, {}
        return {name: total / count for name, (total, count) in logs.items()}

    def section(self, modifier: Modifier) -> dict[str, Any]:
        """The modifier's own part of the report: plain JSON values only."""
        return self.report.setdefault(self.label(modifier), {})

    def label(self, modifier: Modifier) -> str:
        """The modifier's key, with `#2` and so on where a kind repeats in the stage."""
        index = self._index(modifier)
        nth = sum(type(other) is type(modifier) for other in self.modifiers[: index + 1])
        return modifier.key() if nth == 1 else f"{modifier.key()}#{nth}"

    # one-shot

    def tell(self, modifier: Modifier, what: str, done: int, total: int) -> None:
        """Move the progress bar of a part of a modifier's work on the whole model, which the walk can't see into."""
        if self._progress is not None:
            self._progress(f"{self.label(modifier)} ({what})", done, total)

    def run_oneshot(
        self,
        calibration: torch.Tensor | None = None,
        progress: Progress | None = None,
        resume_dir: Path | None = None,
    ) -> None:
        """Let every modifier act once, in order, block by block where it defines `on_block`.

        calibration: int64 [samples, length] token ids; needed by modifiers with `on_block`.
        resume_dir: where finished blocks are kept, so that a killed run goes on from them; the caller removes it once
        the result is saved. DataError when it belongs to another run.
        """
        self.run = "oneshot"
        self._allowed("oneshot")
        self.calibration, self._progress = calibration, progress
        training = self.model.training
        self.model.eval()
        try:
            with fast_float32():
                oneshot.run(self, calibration, progress, resume_dir)
        finally:
            self.model.train(training)

    # training

    def begin(self, steps_per_epoch: int, total_steps: int) -> None:
        """Start a training stage; the windows are compiled to optimizer steps here."""
        self._allowed("train")
        if steps_per_epoch < 1 or total_steps < 1:
            raise ValueError(
                f"{steps_per_epoch} steps per epoch, {total_steps} in total: both must be >= 1"
            )
        self.run = "train"
        self.step, self.steps_per_epoch, self.total_steps = 0, steps_per_epoch, total_steps
        self._windows = [self._compile(m) for m in self.modifiers]
        self._phase = ["waiting"] * len(self.modifiers)
        for modifier in self.modifiers:
            self.call(modifier, "on_initialize")
        self._check_integers()

    def before_step(self) -> None:
        """The clock is at optimizer step `self.step`: start, update and end what is due."""
        for index, (modifier, window) in enumerate(zip(self.modifiers, self._windows, strict=True)):
            if self._phase[index] == "waiting" and window.contains(self.step):
                self._phase[index] = "active"
                self.call(modifier, "on_start")
            if self._phase[index] == "active":
                if self.step >= window.end:
                    self._end(index)
                elif self.step in window.updates and "update_frequency" not in modifier.unused:
                    self.call(modifier, "on_update")

    def loss(self, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        """The total loss of one (micro-)batch after every active modifier has had its say."""
        speaking = [modifier for modifier in self._active() if modifier.defines("on_loss")]
        if speaking:
            self.log("loss/task", loss.detach())
        for modifier in speaking:
            loss = modifier.on_loss(self, loss, batch, outputs)
        if speaking:
            self.log("loss/total", loss.detach())
        self.per_batch.clear()
        return loss

    def before_optimizer(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Gradients exist: those of held zeros become zero, then modifiers see them.

        The optimizer is needed where a modifier sets its learning rate.
        """
        self.optimizer = optimizer
        for layer in self.quantization.values():  # their weights are integers now, and stay so
            layer.module.weight.grad = None
        self.masks.apply_to_gradients(self.model)
        for modifier in self._active():
            if self.call(modifier, "on_gradients"):
                self._law(modifier, "a gradient", self.masks.gradient_violations(self.model))
        self.optimizer = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped: hold the zeros in weights and moments, then advance the clock."""
        self.masks.apply(self.model)
        self.masks.apply_to_moments(self.model, optimizer)
        for modifier in self._active():
            if self.call(modifier, "on_step", optimizer):
                alive = self.masks.moment_violations(self.model, optimizer)
                self._law(modifier, "an optimizer moment", alive)
        self.step += 1

    def finish(self) -> None:
        """End the stage: modifiers still active reach their end."""
        for index, phase in enumerate(self._phase):
            if phase == "active":
                self._end(index)
        for modifier in self.modifiers:
            self.call(modifier, "on_finalize")

    # state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's weights; tensors and plain values (`torch.save`)."""
        return {
            "step": self.step,
            "phase": list(self._phase),
            "masks": self.masks.state_dict(),
            "quantization": {name: layer.state_dict() for name, layer in self.quantization.items()},
            "caches": {name: cache.state_dict() for name, cache in self.caches.items()},
            "report": self.report,
            "generator": self.generator.get_state(),
            "modifiers": [{"key": m.key(), "state": m.state_dict()} for m in self.modifiers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state; in a training stage call `begin` first, with the weights of the checkpoint loaded."""
        keys = [entry["key"] for entry in state["modifiers"]]
        if keys != [m.key() for m in self.modifiers]:
            raise ModelError(
                f"the saved state is of modifiers {keys}, this stage has {[m.key() for m in self.modifiers]};"
                " resume with the recipe that the run was started with"
            )
        self.step = state["step"]
        self._phase = list(state["phase"])
        self.masks.load_state_dict(state["masks"])
        for layer in self.quantization.values():
            detach(layer)
        self.quantization.clear()
        for name, saved in state["quantization"].items():
            layer = LayerQuantization.from_state(self.model.get_submodule(name), saved)
            self.quantization[name] = layer
            attach(layer)
        for cache in self.caches.values():
            cache.detach()
        self.caches.clear()
        for name, saved in state["caches"].items():
            self.caches[name] = CacheQuantization.from_state(self.model.get_submodule(name), saved)
            self.caches[name].attach()
        self.report = state["report"]
        self.generator.set_state(state["generator"])
        for modifier, entry in zip(self.modifiers, state["modifiers"], strict=True):
            modifier.load_state_dict(entry["state"])

    # calling hooks

    def call(self, modifier: Modifier, hook: str, *args: Any, prefix: str = "") -> bool:
        """Call one hook without gradients and check that held zeros are zero; False if it isn't defined.

        prefix: check only parameters whose name starts with it.
        """
        if not modifier.defines(hook):
            return False
        try:
            with torch.no_grad():
                getattr(modifier, hook)(self, *args)
        except LawError as error:
            raise LawError(f"{self.label(modifier)}.{hook}: {error}") from error
        self._law(modifier, "a weight", self.masks.violations(self.model, prefix), hook)
        return True

    def _law(self, modifier: Modifier, what: str, names: list[str], hook: str = "") -> None:
        if names:
            raise LawError(
                f"{self.label(modifier)}{hook and '.' + hook}: {what} of a held zero is not zero in"
                f" {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
            )

    def _compile(self, modifier: Modifier) -> Window:
        """The modifier's window in steps. ModelError when the stage does not have them, or when it holds none."""
        m = modifier
        steps = per_unit(m.unit, self.steps_per_epoch)
        window = Window.compile(m.start, m.end, m.update_frequency, steps, self.total_steps)
        if window.start >= window.end or max(window.start + 1, window.end) > self.total_steps:
            end = "the end" if m.end is None else f"{m.end:g}"
            raise ModelError(
                f"{self.label(m)} acts from {m.start:g} to {end} ({m.unit}), steps {window.start} to {window.end}, but"
                f" the stage has {self.total_steps} steps, {self.steps_per_epoch} in an epoch; move its window or train"
                " longer (max_steps ends a stage early)"
            )
        for name in sorted(m.timing - Modifier.timing):  # `milestones`, `freeze_observer`
            given = getattr(m, name)
            last = max(given) if isinstance(given, dict) else given
            if last is not None and to_step(last, steps) > self.total_steps:
                raise ModelError(
                    f"{self.label(m)}: {name} has {last:g} ({m.unit}), step {to_step(last, steps)}, but the stage has"
                    f" {self.total_steps} steps, {self.steps_per_epoch} in an epoch; make it earlier or train longer"
                    " (max_steps ends a stage early)"
                )
        return window

    def _check_integers(self) -> None:
        """Weights quantized by an earlier stage stay as they are: ModelError unless the recipe freezes them."""
        frozen: set[str] = set()
        for modifier, window in zip(self.modifiers, self._windows, strict=True):
            whole = window.start == 0 and window.end >= self.total_steps
            if isinstance(modifier, TrainableParams) and whole:
                frozen.update(modifier.frozen_names(self))
        loose = [name for name in self.quantization if f"{name}.weight" not in frozen]
        if loose:
            raise ModelError(
                f"a quantized weight can't be trained, it would leave its integer grid: {', '.join(loose[:3])}"
                f"{' and others' if len(loose) > 3 else ''}; put the stage with Quantization after the training stages,"
                " or Quantization into this one, or freeze these weights for the whole stage with TrainableParams"
            )

    def _end(self, index: int) -> None:
        self._phase[index] = "ended"
        self.call(self.modifiers[index], "on_end")

    def _active(self) -> list[Modifier]:
        return [
            m for m, phase in zip(self.modifiers, self._phase, strict=True) if phase == "active"
        ]

    def _index(self, modifier: Modifier) -> int:
        for index, other in enumerate(self.modifiers):
            if other is modifier:
                return index
        raise ValueError(f"{modifier.key()} is not a modifier of this session")

    def _allowed(self, kind: str) -> None:
        for modifier in self.modifiers:
            if kind not in modifier.stages:
                raise ModelError(
                    f"{self.label(modifier)} can't run in a stage of kind {kind}; it runs in"
                    f" {', '.join(sorted(modifier.stages))}"
                )
