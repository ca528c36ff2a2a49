"""How much the loss minds an error at each output of each Linear: one backward pass over a few samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ....errors import ModelError


def importance(
    model: nn.Module, linears: dict[str, nn.Linear], tokens: torch.Tensor, seed: int | None
) -> dict[str, torch.Tensor]:
    """E[g^2] by name, f32 [out]: g is the gradient of a token's loss by a Linear's outputs.

    An error e at the outputs costs about (g . e)^2 / 2, here without the products of different outputs. With a `seed`
    labels are drawn from the model's own predictions: then g g^T is the Fisher information, the curvature of the
    divergence from the model as it is. Without, they are the text's next tokens (the empirical Fisher), which says more
    of where the text will suffer. tokens: int64 [samples, length]. Besides the model this holds one sample's
    activations. Raises ModelError when a Linear gets no gradient or one that is not finite.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    total = {name: torch.zeros(linear.weight.shape[0]) for name, linear in linears.items()}

    def watch(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            total[name] += rows.square().sum(dim=0).cpu()

        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            output.register_hook(add)

        return hook

    with torch.enable_grad(), _only_activations(model):
        handles = [linears[name].register_forward_hook(watch(name)) for name in linears]
        try:
            for row in tokens:
                logits = model(row[None].to(_device(model)), use_cache=False).logits[0].float()
                if generator is None:
                    logits, labels = logits[:-1], row[1:].to(logits.device)
                else:
                    if not bool(logits.isfinite().all()):
                        raise ModelError(
                            "the model's logits hold NaN or infinity; check its weights"
                        )
                    chances = logits.detach().softmax(dim=-1).cpu()
                    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(
                    logits, labels.to(logits.device), reduction="sum"
                )
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    for name, value in total.items():
        if not bool(value.isfinite().all()):
            raise ModelError(
                f"{name}: the loss has no finite gradient by its outputs; check the model and its data type"
            )
    return {name: value / tokens.numel() for name, value in total.items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def _only_activations(model: nn.Module) -> Iterator[None]:
    """No gradients by parameters meanwhile; those by activations start at the embedding's output."""
    trained = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, nn.Module)
    for parameter in trained:
        parameter.requires_grad_(False)
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
