"""The scales that SmoothQuant (auto) and AWQ search for, against plain references."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.blocks import Stream
from paring.modifiers.quantization.inputs import Inputs
from paring.modifiers.quantization.noise_model import NoiseModel
from paring.modifiers.quantization.quantization import Quantization
from paring.modifiers.quantization.schemes import preset
from paring.modifiers.smoothing.awq import AWQ
from paring.modifiers.smoothing.output_error import OutputError
from paring.modifiers.smoothing.pairs import Pair, find_pairs
from paring.modifiers.smoothing.smoothquant import SmoothQuant

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
NORM = "model.layers.0.input_layernorm"


def plain_error(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, scheme: str) -> float:
    """Token by token, row by row: the mean over tokens of |Q(x / s) Q(s W)^T - x W^T|^2 / |x W^T|^2."""
    bits = int(scheme[1])
    group = 16 if bits == 4 else weight.shape[1]
    q = weight * s
    for row in q:
        for part in row.split(group):
            step = part.abs().max() / ((2**bits - 1) / 2)
            step = step.half().float() if group < len(row) else step
            part.copy_((part / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step)
    total = 0.0
    for token in x:
        y = weight @ token
        scaled = token / s
        if scheme.endswith("A8"):
            step = scaled.abs().max() / 127.5
            scaled = (scaled / step).round().clamp(-128, 127) * step
        total += float((q @ scaled - y).square().sum() / y.square().sum())
    return total / len(x)


def observed(block, pair: Pair) -> Inputs:
    inputs = Inputs(1000, 0)
    block.run({next(iter(pair.consumers)): inputs.add})
    return inputs


def pair_of(model: nn.Module, calibration: torch.Tensor, name: str):
    block = Stream(model, calibration).block(0)
    pairs, _ = find_pairs(block)
    return block, next(pair for pair in pairs if pair.name == name)


def test_grouped_query_heads_share_the_scale_of_their_v(pico, calibration):
    model = pico()  # 4 heads of 8 channels, 2 of them for each of 2 key-value heads
    block, pair = pair_of(model, calibration, f"{ATTENTION}.v_proj")
    assert pair.index.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    assert pair.gather(torch.arange(32.0)).tolist() == [*range(8, 16), *range(24, 32)]
    v, o = (
        block.module.self_attn.v_proj.weight.clone(),
        block.module.self_attn.o_proj.weight.clone(),
    )
    before = block.outputs()
    scale = torch.rand(16) + 0.5
    pair.fold(scale)
    assert torch.allclose(block.module.self_attn.v_proj.weight, v / scale[:, None])
    by_head = scale.reshape(2, 1, 8).expand(2, 2, 8).reshape(-1)
    assert torch.allclose(block.module.self_attn.o_proj.weight, o * by_head)
    for x, y in zip(before, block.outputs(), strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_an_input_that_is_always_zero_is_left_alone(pico, calibration):
    model = pico()
    mlp = model.get_submodule(MLP)
    mlp.up_proj.weight.data[5] = 0
    _, pair = pair_of(model, calibration, f"{MLP}.up_proj")
    assert pair.index[5] == -1
    assert pair.index[6] == 6
    down = mlp.down_proj.weight.clone()
    pair.fold(torch.full((64,), 3.0))
    assert torch.equal(mlp.down_proj.weight[:, 5], down[:, 5])
    assert torch.allclose(mlp.down_proj.weight[:, 6], 3 * down[:, 6])


def test_a_linear_that_something_else_reads_is_no_source(pico, calibration):
    model = pico()
    block = Stream(model, calibration).block(0)
    mlp = block.module.mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        up = mlp.up_proj(x)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up) + 0.1 * up[..., :32]

    mlp.forward = forward
    assert f"{MLP}.up_proj" not in {pair.name for pair in find_pairs(block)[0]}
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) ** 2)
    assert f"{MLP}.up_proj" not in {pair.name for pair in find_pairs(block)[0]}


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A8"])
@pytest.mark.parametrize("name", [f"{ATTENTION}.v_proj", f"{MLP}.up_proj"])
def test_the_output_error_is_the_plain_one(pico, calibration, scheme, name):
    model = pico()
    block, pair = pair_of(model, calibration[:4], name)
    inputs = observed(block, pair)
    (linear,) = pair.consumers.values()
    grouped = 16 if scheme.startswith("W4") else None
    error = OutputError(pair, [linear], inputs, preset(scheme, [], group_size=grouped))
    scale = torch.rand(pair.width) + 0.2
    s = scale[pair.index]
    weight = linear.weight.detach()
    assert error(scale) == pytest.approx(plain_error(inputs.tokens, weight, s, scheme), rel=1e-3)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_the_noise_model_predicts_the_error_of_rounding(dynamic, scheme):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 128, bias=False)
    linear.weight.data = torch.randn(128, 256, generator=generator)
    inputs = Inputs(1000, 0)
    inputs.add(torch.randn(4, 200, 256, generator=generator) * torch.linspace(0.5, 5, 256))
    pair = Pair("norm", nn.RMSNorm(256), {"linear": linear})
    group = preset(scheme, [], dynamic=dynamic)
    model = NoiseModel(inputs, [linear.weight.detach()], group)
    for scale in (torch.ones(256), torch.linspace(0.5, 5, 256)):
        measured = OutputError(pair, [linear], inputs, group)(scale)
        # static: a sum of powers stands for the largest channel
        assert float(model(scale)) == pytest.approx(measured, rel=0.1 if dynamic else 0.5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_auto_smoothing_beats_every_fixed_strength_on_planted_outliers(pico, calibration, dynamic):
    def error_after(strength: float | str | None) -> float:
        model = pico()
        model.get_submodule(NORM).weight.data[[3, 17]] = 40.0
        block, pair = pair_of(model, calibration, NORM)
        if strength is not None:
            auto = {"dynamic": dynamic} if strength == "auto" else {}
            smooth = SmoothQuant(
                smoothing_strength=strength, targets=["q_proj", "k_proj", "v_proj"], **auto
            )
            session = Session(model, [smooth])
            session.run_oneshot(calibration)
            if strength == "auto":
                found = session.report["SmoothQuant"]["pairs"][NORM]
                assert found["error"] < 0.3 * found["error_before"]
        block, pair = pair_of(model, calibration, NORM)
        scheme = preset("W8A8", [], dynamic=dynamic)
        linears = list(pair.consumers.values())
        return OutputError(pair, linears, observed(block, pair), scheme)(torch.ones(32))

    auto = error_after("auto")
    assert auto < 0.3 * error_after(None)
    assert all(auto <= 1.02 * error_after(step / 4) for step in range(5))


def test_awq_takes_the_ratio_with_the_least_plain_error(pico, calibration):
    model = pico()
    model.get_submodule(NORM).weight.data[[3, 17]] = 20.0
    block, pair = pair_of(model, calibration[:4], NORM)
    inputs = observed(block, pair)
    x, names = inputs.tokens, ["q_proj", "k_proj", "v_proj"]
    weights = [block.module.self_attn.get_submodule(name).weight.detach().clone() for name in names]
    a = (x / x.square().mean(dim=1, keepdim=True).sqrt()).abs().mean(dim=0)
    stacked = torch.cat(weights).abs()
    w = torch.cat([part / part.amax(dim=1, keepdim=True) for part in stacked.split(16, 1)], 1)
    best, scale = float("inf"), torch.ones(32)
    for step in range(9):
        s = a ** (step / 8) / (w.mean(dim=0) ** (1 - step / 8) + 1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = sum(plain_error(x, weight.clone(), s, "W4A16") for weight in weights)
        if error < best:
            best, scale = error, s
    plain = sum(plain_error(x, weight, torch.ones(32), "W4A16") for weight in weights)
    awq = AWQ(group_size=16, n_grid=8, targets=names)
    session = Session(model, [awq])
    session.run_oneshot(calibration[:4])
    found = session.report["AWQ"]["pairs"][NORM]
    assert found["error"] == pytest.approx(best / 3, rel=1e-3)
    assert found["error"] < 0.7 * plain / 3
    norm = torch.ones(32)
    norm[[3, 17]] = 20.0
    assert torch.allclose(model.get_submodule(NORM).weight, norm / scale, rtol=1e-3)


def test_settings_that_can_not_work_are_refused(pico, calibration):
    with pytest.raises(ValidationError, match="needs smoothing_strength: auto"):
        SmoothQuant(smoothing_strength=0.5, scheme="W4A16")
    with pytest.raises(ValidationError):
        SmoothQuant(smoothing_strength="automatic")
    with pytest.raises(ModelError, match="no multiple of group_size 128"):
        Session(pico(), [AWQ()]).run_oneshot(calibration)
    with pytest.raises(ModelError, match="put smoothing before Quantization"):
        Session(pico(), [Quantization(ignore=["v_proj"]), AWQ(group_size=16)]).run_oneshot(
            calibration
        )


def test_a_channel_that_calibration_hardly_used_is_not_blown_up(pico, calibration):
    model = pico()
    up = model.get_submodule(f"{MLP}.up_proj").weight
    up.data[9] *= 1e-6
    before = up.detach().clone()
    Session(model, [SmoothQuant(smoothing_strength="auto", dynamic=False)]).run_oneshot(calibration)
    grown = (up.norm(dim=1) / before.norm(dim=1)).detach()
    assert float(grown[9]) < 2e3 * float(grown.median())


def test_the_progress_line_tells_the_error(pico, calibration):
    notes = []
    steps = [SmoothQuant(smoothing_strength="auto")]
    Session(pico(), steps).run_oneshot(calibration, lambda *call: notes.append(call[3:]))
    assert sum("error" in note[0] and "->" in note[0] for note in notes if note) == 2


def test_mostly_dead_channels_do_no_harm(pico, calibration):
    model = pico()
    model.get_submodule(f"{MLP}.up_proj").weight.data[:40] = 0
    with torch.no_grad():
        before = model(calibration).logits
        steps = [SmoothQuant(smoothing_strength="auto"), AWQ(group_size=16)]
        Session(model, steps).run_oneshot(calibration)
        assert torch.allclose(model(calibration).logits, before, atol=1e-5)
