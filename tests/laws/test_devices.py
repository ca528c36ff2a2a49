"""A one-shot stage computes the same on another device: nothing it makes stays behind on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretended_device import DEVICE, PretendedDevice

from paring.modifiers import Modifier, Session, registry

Modifiers = list[dict[str, dict[str, Any]]]

LISTS: dict[str, Modifiers] = {
    "magnitude": [
        {"MagnitudePruning": {"sparsity": 0.5, "ignore": ["lm_head"]}},
        {"ConstantPruning": {}},
    ],
    "wanda": [{"Wanda": {"mask_structure": "2:4"}}],
    "owl": [{"Wanda": {"sparsity": 0.5, "sparsity_profile": "owl"}}],
    "sparsegpt": [{"SparseGPT": {"sparsity": 0.5, "mask_structure": "1x4"}}],
    "sensitivity": [{"ADMMPruning": {"sparsity": 0.6, "sparsity_profile": "sensitivity"}}],
    "n:16": [{"ADMMPruning": {"sparsity": 0.6, "mask_structure": "n:16"}}],
    "2x1": [{"ADMMPruning": {"sparsity": 0.5, "mask_structure": "2x1"}}],
    "auto": [
        {
            "ADMMPruning": {
                "mask_structure": "auto",
                "budget": {"bytes_per_weight": 0.7},
                "candidates": ["unstructured", "8:16"],
            }
        }
    ],
    "reconstruction": [
        {"ADMMPruning": {"sparsity": 0.5}},
        # "auto" is bfloat16 on a CPU with units for it alone
        {"BlockReconstruction": {"epochs": 1, "dtype": "float32"}},
    ],
    "structured": [{"LLMPruner": {"sparsity": 0.5, "samples": 4}}],
    "equalization": [{"LogarithmicEqualization": {}}, {"Quantization": {"scheme": "W8A8"}}],
    "smoothing": [
        {"SmoothQuant": {"smoothing_strength": "auto"}},
        {
            "Quantization": {
                "scheme": "W8A8",
                "dynamic": False,
                "skip": {"by": "output_error", "budget": "20%"},
                "kv_cache": "int8",
            }
        },
    ],
    "awq": [
        {"AWQ": {"scheme": "W4A16", "group_size": 16}},
        {"Quantization": {"scheme": "W4A16", "group_size": 16, "observer": "mse"}},
    ],
    "gptq": [
        {"SparseGPT": {"sparsity": 0.5}},
        {"GPTQ": {"scheme": "W4A8", "group_size": 16, "actorder": "static"}},
        {"HeadGPTQ": {"group_size": 16}},
    ],
}


def run(model: Any, modifiers: Modifiers, calibration: torch.Tensor, device: Any) -> Session:
    """Prune a little, then the modifiers on the device, and back."""
    made: list[Modifier] = [
        registry()[key](**fields) for entry in modifiers for key, fields in entry.items()
    ]
    session = Session(model, made)
    for weight in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        values = model.get_parameter(weight).data
        values[:, ::4] = 0
        session.masks.hold(weight, values != 0)
    session.to(device)
    model.tie_weights()  # PyTorch keeps them tied on the way to a GPU, not to what isn't there
    assert session.device == torch.device(device)
    session.run_oneshot(calibration)
    session.to("cpu")
    model.tie_weights()
    return session


def state_of(session: Session) -> dict[str, Any]:
    """Scales and the like, as plain values."""
    both = {**session.quantization, **{f"{n} cache": c for n, c in session.caches.items()}}
    return {
        f"{name} {key}": value.tolist() if isinstance(value, torch.Tensor) else value
        for name, found in both.items()
        for key, value in found.state_dict().items()
    }


class UnfusedAdam(torch.optim.Adam):
    """The fused one refuses devices that it does not know."""

    def __init__(self, *args: Any, fused: bool | None = None, **options: Any) -> None:
        super().__init__(*args, **options)


def bytes_of(tensors: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_every_oneshot_modifier_is_here():
    here = {key for modifiers in LISTS.values() for entry in modifiers for key in entry}
    defined = {
        cls.key()
        for cls in registry().values()
        if "oneshot" in cls.stages
        and (cls.on_block is not Modifier.on_block or cls.on_update is not Modifier.on_update)
    }
    assert here == defined


@pytest.mark.parametrize("name", LISTS)
def test_another_device_gives_the_same_weights(pico, calibration, name, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", UnfusedAdam)
    here, there = pico(), pico()
    for model in (here, there):  # fused attention is computed in another way on another device
        model.set_attn_implementation("eager")
    expected = run(here, LISTS[name], calibration, "cpu")
    with PretendedDevice():
        found = run(there, LISTS[name], calibration, DEVICE)
    assert bytes_of(there.state_dict()) == bytes_of(here.state_dict())
    assert bytes_of(dict(found.masks.items())) == bytes_of(dict(expected.masks.items()))
    assert state_of(found) == state_of(expected)
