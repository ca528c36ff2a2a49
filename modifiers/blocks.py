"""Walking a decoder block by block: the streams of hidden states, and one block with what goes into it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError, LawError, ModelError
from . import spill
from .capture import Call, Stop, capture, find_blocks
from .targets import select

__all__ = ["Block", "Observer", "Stream", "capture", "find_blocks"]

Observer = Callable[[torch.Tensor], None]
"""Called with a module's input, [batch, length, width]."""


class Stream:
    """Calibration tokens on their way through the blocks of a model.

    They move only when somebody looks at a block's inputs, through the blocks before it as these are then: compressed.
    So a pass in which nobody looks costs no forward and needs no data. With `reference` a second stream goes through
    the blocks as they were when this one was made; whoever changes a block must call `advance_reference` before.
    Hidden states over `spill.THRESHOLD` bytes live in a file in `folder` (not given: the system's temporary one).
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: torch.Tensor | None,
        reference: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self.has_reference = reference
        self._calibration = calibration
        self._position = 0
        self._inputs: list[torch.Tensor] | None = None
        self._reference: list[torch.Tensor] = []
        self._reference_position = 0
        self._calls: list[list[Call]] = []
        self._folder = folder
        self._spills: list[spill.Spill] = []

    @property
    def has_data(self) -> bool:
        return self._calibration is not None

    def block(self, index: int) -> Block:
        return Block(self, index)

    def inputs(self, index: int) -> list[torch.Tensor]:
        """The inputs of a block, by batch: [batch, length, width]. Blocks must be asked for in order.

        The list is the stream's own: it moves on when a later block's inputs are asked for.
        """
        if index < self._position:
            raise IndexError(f"block {index}: the stream is at block {self._position} already")
        inputs = self._start()
        while self._position < index:
            self._move(inputs, self._position)
            self._position += 1
        return inputs

    def advance_reference(self, index: int) -> None:
        """Take the reference stream through block `index` as it is now; the blocks before it must be unchanged still,
        or have been passed already. Does nothing without reference or data."""
        if not self.has_reference or not self.has_data:
            return
        self._start()
        while self._reference_position <= index:
            self._move(self._reference, self._reference_position)
            self._reference_position += 1

    def reference_outputs(self, index: int) -> list[torch.Tensor]:
        """What the unchanged blocks up to `index` put out, by batch; the reference stream must stand right after it."""
        if not self.has_reference:
            raise LawError("asks for the reference outputs of a block without `needs_reference`")
        if self._reference_position != index + 1:
            raise IndexError(
                f"block {index}: the reference stream is before block {self._reference_position}"
            )
        return self._reference

    @torch.no_grad()
    def forward(self, index: int, batch: int) -> torch.Tensor:
        """One block's output for one batch of the stream's present hidden states."""
        assert self._inputs is not None
        return self.compute(index, self._inputs[batch], batch)

    def compute(
        self, index: int, hidden: torch.Tensor, batch: int, rows: slice | None = None
    ) -> torch.Tensor:
        """A block's output for any hidden states in the place of a batch's, or of the rows named of it."""
        call = self._calls[index][batch]
        args, kwargs = call.args, call.kwargs
        if rows is not None:
            assert self._inputs is not None
            size = self._inputs[batch].shape[0]
            args, kwargs = _select_rows((args, kwargs), rows, size)
        output = self.blocks[index][1](hidden, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, torch.Tensor)
        return result

    def _start(self) -> list[torch.Tensor]:
        if self._inputs is None:
            assert self._calibration is not None
            self._inputs, self._calls = capture(self.model, self._calibration, self._keep)
            if self.has_reference:
                self._reference = list(self._inputs)
                if self._spills:
                    self._spills.append(spill.Spill(self._folder, self._spills[0].size))
                    self._reference = [self._spills[1].keep(states) for states in self._inputs]
        return self._inputs

    def _keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where the first hidden states of a batch are to live: in memory, or in a file."""
        assert self._calibration is not None
        size = self._calibration.numel() * hidden.shape[-1] * hidden.element_size()
        if size * (1 + self.has_reference) <= spill.THRESHOLD or hidden.device.type != "cpu":
            return hidden
        if not self._spills:
            self._spills.append(spill.Spill(self._folder, size))
        return self._spills[0].keep(hidden)

    @torch.no_grad()
    def _move(self, states: list[torch.Tensor], index: int) -> None:
        """Replace the hidden states before a block by those after it, batch by batch."""
        for batch, hidden in enumerate(states):
            after = self.compute(index, hidden, batch)
            if not bool(after.isfinite().all()):
                raise ModelError(
                    f"block {index} puts out NaN or infinity; check the model's weights and its data type"
                )
            if self._spills:
                hidden.copy_(after)
            else:
                states[batch] = after
        for file in self._spills:
            file.rest()


def _select_rows(value: Any, rows: slice, size: int) -> Any:
    """Of every tensor with a batch axis of `size`, in nested containers, the rows named."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == size > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_select_rows(item, rows, size) for item in value)
    if isinstance(value, dict):
        return {key: _select_rows(item, rows, size) for key, item in value.items()}
    return value


class Block:
    """One decoder block in a one-shot pass, with the inputs it gets from the compressed blocks before it."""

    def __init__(self, stream: Stream, index: int) -> None:
        self.model = stream.model
        self.name, self.module = stream.blocks[index]
        self.index = index
        self.reader = (
            "this modifier"  # who looks at the inputs, for the message when there are none
        )
        self._stream = stream

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Hidden states by batch, each [batch, length, width]. DataError in a stage without calibration data."""
        if not self._stream.has_data:
            raise DataError(f"{self.reader} needs calibration data; give the stage `data:`")
        return self._stream.inputs(self.index)

    def reference_outputs(self) -> list[torch.Tensor]:
        """What this block put out, by batch, in the model as it was when this walk began: its own inputs then, through
        itself as it was. For modifiers with `needs_reference`; DataError in a stage without calibration data.
        """
        if not self._stream.has_data:
            raise DataError(f"{self.reader} needs calibration data; give the stage `data:`")
        return self._stream.reference_outputs(self.index)

    def compute(self, hidden: torch.Tensor, batch: int, rows: slice | None = None) -> torch.Tensor:
        """The block's output [batch, length, width] for `hidden`, with the other arguments that the model passes with
        the batch numbered `batch`, or with the rows named of it. With gradients, where these are enabled.
        """
        return self._stream.compute(self.index, hidden, batch, rows)

    def modules(
        self, targets: Sequence[str], ignore: Sequence[str] = ()
    ) -> Iterator[tuple[str, nn.Module]]:
        """As Session.modules, restricted to this block; a pattern must match somewhere in the whole model."""
        for name, module in select(self.model, targets, ignore):
            if name.startswith(f"{self.name}."):
                yield name, module

    def linears(self, targets: Sequence[str], ignore: Sequence[str] = ()) -> dict[str, nn.Linear]:
        """The `nn.Linear` modules among `modules`."""
        found = self.modules(targets, ignore)
        return {name: module for name, module in found if isinstance(module, nn.Linear)}

    @torch.no_grad()
    def run(self, hooks: Mapping[str, Observer], batches: int | None = None) -> None:
        """Replay the block on its inputs (the first `batches`); observers see what goes into the modules named.

        The weights are those of now: of modifiers earlier in the list, changed already. A replay ends as soon as every
        observer has been called, so that what comes after the last module costs nothing.
        """
        if not hooks:
            return
        replays = range(len(self.inputs))[:batches]  # moves the stream: before there are hooks
        waiting: set[str] = set()

        def watch(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                observer(args[0])
                waiting.discard(name)
                if not waiting:
                    raise Stop

            return hook

        modules = {name: self.model.get_submodule(name) for name in hooks}
        handles = [
            module.register_forward_pre_hook(watch(name, hooks[name]))
            for name, module in modules.items()
        ]
        try:
            for index in replays:
                waiting.update(hooks)
                with contextlib.suppress(Stop):
                    self._forward(index)
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, batches: int | None = None) -> list[torch.Tensor]:
        """Replay the block and return its outputs, each [batch, length, width]."""
        return [self._forward(index) for index in range(len(self.inputs))[:batches]]

    def _forward(self, batch: int) -> torch.Tensor:
        return self._stream.forward(self.index, batch)

    def shared_inputs(self, linears: Mapping[str, nn.Linear]) -> list[list[str]]:
        """Group Linears that read the very same input tensor, such as q, k and v; found by one forward."""
        seen: list[
            tuple[torch.Tensor, list[str]]
        ] = []  # keeps the tensors alive, so that addresses stay theirs

        def remember(name: str) -> Observer:
            def observe(x: torch.Tensor) -> None:
                for tensor, names in seen:
                    if tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape:
                        names.append(name)
                        return
                seen.append((x, [name]))

            return observe

        self.run({name: remember(name) for name in linears}, batches=1)
        missed = sorted(set(linears) - {name for _, names in seen for name in names})
        if missed:
            raise ModelError(
                f"{missed[0]} is never called as a Linear, so that its inputs are unknown; put it in `ignore`"
            )
        return [names for _, names in seen]
