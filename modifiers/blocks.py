"""Walking a decoder block by block: find the blocks, capture what the model passes to them, replay one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError, ModelError
from .targets import select

Observer = Callable[[torch.Tensor], None]
"""Called with a module's input, [batch, length, width]."""

BATCH = 4  # calibration sequences per replayed batch


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names: the longest list of same-class modules that is not inside another block.

    Raises ModelError when the model has none.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        same = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if (
            same
            and not inside
            and any(True for child in module.children() for _ in child.children())
        ):
            assert isinstance(module, nn.ModuleList)
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList of modules of one class)"
        )
    name, blocks = max(found, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


@dataclass
class Call:
    """What the model passes to a block besides the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """Calibration tokens on their way through the blocks of a model.

    They move only when somebody looks at a block's inputs, through the blocks before it as these are then: compressed.
    So a pass in which nobody looks costs no forward and needs no data.
    """

    def __init__(self, model: nn.Module, calibration: torch.Tensor | None) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self._calibration = calibration
        self._position = 0
        self._inputs: list[torch.Tensor] | None = None
        self._calls: list[list[Call]] = []

    @property
    def has_data(self) -> bool:
        return self._calibration is not None

    def block(self, index: int) -> Block:
        return Block(self, index)

    def inputs(self, index: int) -> list[torch.Tensor]:
        """The inputs of a block, by batch: [batch, length, width]. Blocks must be asked for in order."""
        if self._inputs is None:
            assert self._calibration is not None
            self._inputs, self._calls = capture(self.model, self._calibration)
        if index < self._position:
            raise IndexError(f"block {index}: the stream is at block {self._position} already")
        while self._position < index:
            batches = range(len(self._inputs))
            self._inputs = [self.forward(self._position, batch) for batch in batches]
            self._position += 1
        return self._inputs

    @torch.no_grad()
    def forward(self, index: int, batch: int) -> torch.Tensor:
        """One block's output for one batch of the stream's present hidden states."""
        assert self._inputs is not None
        call = self._calls[index][batch]
        output = self.blocks[index][1](self._inputs[batch], *call.args, **call.kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        return hidden


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
                    raise _Stop

            return hook

        modules = {name: self.model.get_submodule(name) for name in hooks}
        handles = [
            module.register_forward_pre_hook(watch(name, hooks[name]))
            for name, module in modules.items()
        ]
        try:
            for index in replays:
                waiting.update(hooks)
                with contextlib.suppress(_Stop):
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
        return [names for _, names in seen]


class _Stop(Exception):
    """Ends a forward once everything asked for has been seen."""


@torch.no_grad()
def capture(
    model: nn.Module, calibration: torch.Tensor
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """The inputs of the first block, by batch, and the other arguments of every block, by block and batch.

    calibration: int64 [samples, length]. The blocks hand their input through unchanged meanwhile, so this costs one
    embedding lookup; blocks may still get different masks or position embeddings (sliding windows).
    """
    if calibration.ndim != 2 or calibration.numel() == 0:
        raise DataError(
            f"calibration must be token ids [samples, length], got {tuple(calibration.shape)}"
        )
    blocks = find_blocks(model)
    inputs: list[torch.Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    device = next(model.parameters()).device
    returns_tuple = _returns_tuple(model, blocks[0][1], calibration[:1, :2].to(device))

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, kwargs = _split(args, kwargs)
            if index == 0:
                inputs.append(hidden)
            calls[index].append(Call(rest, kwargs))
            if index == len(blocks) - 1:
                raise _Stop
            return (hidden,) if returns_tuple else hidden

        return forward

    originals = [block.forward for _, block in blocks]
    try:
        for index, (_, block) in enumerate(blocks):
            block.forward = recorder(index)
        for batch in torch.split(calibration, BATCH):
            try:
                model(batch.to(device), use_cache=False)
            except _Stop:
                continue
            raise ModelError(f"a forward of {type(model).__name__} never reached its last block")
    finally:
        for (_, block), original in zip(blocks, originals, strict=True):
            if "forward" in vars(block):
                del block.forward
            if block.forward != original:  # somebody had replaced the method before us
                block.forward = original
    return inputs, calls


def _returns_tuple(model: nn.Module, block: nn.Module, tokens: torch.Tensor) -> bool:
    results: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, output: results.append(output))
    try:
        model(tokens, use_cache=False)
    finally:
        handle.remove()
    return isinstance(results[0], tuple)


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
