from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from paring.modifiers import Modifier, Session, registry
from paring.modifiers.quantization.layer import half_exact
from paring.modifiers.reconstruction.latent import LatentWeight

R = registry()


def inflate(model: nn.Module) -> nn.Module:
    """Weights large enough that blocks do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    return model


def reconstruction(**fields: Any) -> Modifier:
    return R["BlockReconstruction"](**{"dtype": "float32", "epochs": 6, **fields})


def hidden_states(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block puts out."""
    states: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda *call: states.append(call[-1]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return states[0]


def relative_error(model: nn.Module, dense: torch.Tensor, tokens: torch.Tensor) -> float:
    error = (hidden_states(model, tokens) - dense).square().sum(-1)
    return float((error / dense.square().sum(-1)).mean())


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and held-out sequences."""
    ids = torch.randint(0, 128, (56, 16), generator=torch.Generator().manual_seed(1))
    return ids[:48], ids[48:]


PRUNE = {"sparsity": 0.5, "ignore": ["lm_head"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [4, 2])
def test_it_lowers_the_error_on_unseen_tokens(pico, tokens, dtype, batch_size):
    calibration, unseen = tokens
    dense = hidden_states(inflate(pico()), unseen)
    errors = []
    for more in [], [reconstruction(dtype=dtype, batch_size=batch_size)]:
        model = inflate(pico())
        session = Session(model, [R["SparseGPT"](**PRUNE), *more])
        session.run_oneshot(calibration)
        errors.append(relative_error(model, dense, unseen))
        assert not session.masks.violations(model)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert errors[1] < 0.8 * errors[0]
    found = session.report["BlockReconstruction"]
    assert found["dtype"] == dtype
    assert all(block["after"] < block["before"] for block in found["blocks"].values())
    for name, mask in session.masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()  # what is kept was trained, not masked


@pytest.mark.parametrize("scheme", [{"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 16}])
def test_quantized_layers_end_on_their_grid(pico, tokens, scheme):
    calibration, unseen = tokens
    dense = hidden_states(inflate(pico()), unseen)
    errors = []
    for more in [], [reconstruction()]:
        model = inflate(pico())
        quantization = R["Quantization"](**scheme, ignore=["lm_head"])
        session = Session(model, [R["SparseGPT"](**PRUNE), quantization, *more])
        session.run_oneshot(calibration)
        errors.append(relative_error(model, dense, unseen))
    assert errors[1] < 0.8 * errors[0]
    assert len(session.quantization) == 14
    for name, layer in session.quantization.items():
        assert "forward" not in vars(layer.module)
        q = layer.quantized_weight
        groups = q.reshape(*layer.scale.shape, -1) * layer.scale.unsqueeze(2)
        assert torch.equal(groups.reshape(q.shape), layer.module.weight)
        assert not layer.module.weight[~session.masks[f"{name}.weight"]].any()
        assert not layer.scale.requires_grad


def test_a_latent_weight_computes_as_its_grid_and_passes_gradients_through(pico, calibration):
    model = pico()
    session = Session(model, [R["Quantization"](scheme="W4A16", group_size=16, ignore=["lm_head"])])
    session.run_oneshot(calibration)
    layer = session.quantization["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32)
    before = layer.module(x)
    latent = LatentWeight(layer, None)
    latent.attach()
    output = layer.module(x)
    assert torch.allclose(output, before, atol=1e-6)
    output.sum().backward()
    plain = x.sum(0).expand(64, 32)  # of the sum of x W^T, by every weight
    assert torch.allclose(latent.weight.grad, plain, atol=1e-5)
    # by a scale's factor: sum over its group of x * (q - w / s) * s, and q = w / s on the grid
    assert torch.allclose(latent.log_factor.grad, torch.zeros(64, 2), atol=1e-5)
    with torch.no_grad():
        latent.weight.add_(layer.scale.repeat_interleave(16, 1) * 0.4)  # not over half a step
        latent.log_factor.add_(0.1)
    expected = layer.quantized_weight.clamp(-8, 7)
    latent.detach()
    scale = layer.scale.clone()
    latent.settle()
    assert torch.equal(layer.scale, half_exact(scale * torch.exp(torch.tensor(0.1))))
    moved = (layer.quantized_weight - expected).abs()
    assert int(moved.max()) <= 1


def test_only_its_targets_are_trained(pico, tokens):
    model = inflate(pico())
    pruner = R["SparseGPT"](**PRUNE)
    modifier = reconstruction(epochs=1, targets=["up_proj"], norms=False)
    seen: dict[str, torch.Tensor] = {}

    class _Snapshot(Modifier):
        def on_block(self, session: Session, block: Any) -> None:
            seen.update({n: p.clone() for n, p in block.module.named_parameters(block.name)})

    Session(model, [pruner, _Snapshot(), modifier]).run_oneshot(tokens[0])
    changed = {n.split(".", 3)[3] for n, p in seen.items() if not model.get_parameter(n).equal(p)}
    assert changed == {"mlp.up_proj.weight"}


def test_huge_tokens_do_not_own_the_loss(pico, tokens):
    """The first token's state is thousands of times larger; the others must still get better."""
    calibration, unseen = tokens
    calibration[:, 0] = unseen[:, 0] = 5

    def make() -> nn.Module:
        model = inflate(pico())
        with torch.no_grad():
            model.model.embed_tokens.weight[5] *= 3000
        return model

    dense = hidden_states(make(), unseen)[:, 1:]
    errors = []
    for more in [], [reconstruction()]:
        model = make()
        Session(model, [R["SparseGPT"](**PRUNE), *more]).run_oneshot(calibration)
        states = hidden_states(model, unseen)[:, 1:]
        errors.append(float(((states - dense).square().sum(-1) / dense.square().sum(-1)).mean()))
    assert errors[1] < 0.8 * errors[0]


class Killed(Exception):
    pass


def stage(
    pico: Any, calibration: torch.Tensor, folder: Any = None, kill_at: int | None = None
) -> tuple[nn.Module, Session]:
    """Two walks with a reference, the second of a model that the first has quantized in part."""
    model = inflate(pico(layers=3))
    modifiers = [
        R["SparseGPT"](**PRUNE),
        R["Quantization"](targets=["up_proj"]),
        reconstruction(epochs=1),
        R["Quantization"](
            scheme="W4A16",
            group_size=16,
            targets=["down_proj"],
            skip={"by": "input_range", "top": 1},
        ),
        reconstruction(epochs=1),
    ]
    finished = []

    def progress(label: str, done: int, total: int, note: str = "") -> None:
        finished.append((label, done))
        if kill_at is not None and len(finished) > kill_at:
            raise Killed

    session = Session(model, modifiers, seed=5)
    session.run_oneshot(calibration, progress, folder)
    return model, session


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 12, 13, 15, 17])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(pico, calibration, tmp_path, kill_at):
    with pytest.raises(Killed):
        stage(pico, calibration, tmp_path, kill_at)
    model, session = stage(pico, calibration)
    other, resumed = stage(pico, calibration, tmp_path)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, layer in session.quantization.items():
        assert torch.equal(layer.scale, resumed.quantization[name].scale)
    assert json.dumps(session.report) == json.dumps(resumed.report)


def test_a_parameter_that_no_token_reached_stays(pico, tokens):
    """As an expert that is never chosen."""
    model = inflate(pico())
    for block in model.model.layers:
        block.idle = nn.Linear(4, 4)
    before = model.model.layers[0].idle.weight.clone()
    Session(
        model, [R["Wanda"](targets=["up_proj"], sparsity=0.5), reconstruction(epochs=1)]
    ).run_oneshot(tokens[0])
    assert torch.equal(model.model.layers[0].idle.weight, before)
