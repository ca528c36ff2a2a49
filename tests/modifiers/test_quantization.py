from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.pruning.magnitude import MagnitudePruning
from paring.modifiers.quantization.layer import fake_quantize_dynamic, fake_quantize_static
from paring.modifiers.quantization.observers import MinMax, weight_scale
from paring.modifiers.quantization.quantization import Quantization
from paring.modifiers.quantization.schemes import WeightArgs
from paring.modifiers.training.trainable_params import TrainableParams

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_weights_are_compressed_tensors_weights(pico, calibration, bits, group):
    model = pico()
    before = model.get_submodule(UP).weight.detach().clone()
    settings = {"num_bits": bits, "strategy": "group" if group else "channel"}
    groups = before.reshape(64, -1, group or 32)
    args = QuantizationArgs(**settings, symmetric=True, group_size=group or None)
    scale, zero = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), args)
    if group:
        scale = scale.half().float()
    expected = fake_quantize(before, scale, zero, args)
    if group:
        settings["group_size"] = group
    quantization = Quantization(config_groups={"all": {"targets": ["Linear"], "weights": settings}})
    session = Session(model, [quantization])
    session.run_oneshot(calibration)
    layer = session.quantization[UP]
    assert torch.equal(model.get_submodule(UP).weight, expected)
    assert torch.equal(layer.scale, scale)
    assert layer.group_size == group
    q = layer.quantized_weight
    assert q.dtype == torch.int8
    assert torch.equal(q.reshape(groups.shape) * scale.unsqueeze(2), expected.reshape(groups.shape))


def test_dynamic_activations_are_compressed_tensors_activations():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32) * torch.logspace(-3, 3, 7).reshape(1, 7, 1)
    x[1, 2] = 0
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(fake_quantize_dynamic(x), fake_quantize(x, scale, zero, args))


def test_static_activations_are_compressed_tensors_activations():
    torch.manual_seed(0)
    x = torch.randn(5, 32) * 3 + 1
    observer = MinMax()
    for row in x.split(2):
        observer.add(row)
    scale, zero = observer.qparams()
    args = QuantizationArgs(num_bits=8, symmetric=False, strategy="tensor")
    wanted_scale, wanted_zero = calculate_qparams(x.min(), x.max(), args)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(zero, wanted_zero.to(torch.int32))
    expected = fake_quantize(x, wanted_scale, wanted_zero, args)
    assert torch.allclose(fake_quantize_static(x, scale, zero), expected, atol=1e-6)


def test_mse_has_the_smaller_error():
    torch.manual_seed(0)
    weight = torch.randn(16, 64) ** 3
    errors = {}
    for observer in ("minmax", "mse"):
        scale = weight_scale(weight, 32, WeightArgs(num_bits=4, observer=observer))
        q = (weight.reshape(16, 2, 32) / scale.unsqueeze(2)).round().clamp(-8, 7)
        errors[observer] = (q * scale.unsqueeze(2) - weight.reshape(16, 2, 32)).square().sum(dim=2)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.97 * errors["minmax"].sum()


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "W4A8"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_model_computes_what_the_scheme_says(pico, calibration, scheme, dynamic):
    model = pico()
    session = Session(model, [Quantization(scheme=scheme, dynamic=dynamic, group_size=32)])
    session.run_oneshot(calibration)
    assert len(session.quantization) == 14  # all Linears in blocks, not the head
    layer = session.quantization[UP]
    assert (layer.scheme, layer.weight_bits) == (scheme, int(scheme[1]))
    assert layer.input_bits == (8 if scheme.endswith("A8") else None)
    x = torch.randn(2, 5, 32)
    expected = x
    if layer.input_bits:
        expected = (
            fake_quantize_dynamic(x)
            if dynamic
            else fake_quantize_static(x, layer.input_scale, layer.input_zero_point)
        )
    linear = model.get_submodule(UP)
    assert torch.equal(linear(x), expected @ linear.weight.T)


def test_gradients_pass_straight_through(pico, calibration):
    model = pico()
    Session(model, [Quantization()]).run_oneshot(calibration)
    x = torch.randn(2, 32, requires_grad=True)
    linear = model.get_submodule(UP)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(dim=0).expand(2, 32), atol=1e-6)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_pruned_weight_stays_exactly_zero(pico, calibration, scheme, observer):
    model = pico()
    modifiers = [
        MagnitudePruning(sparsity=0.6, ignore=["lm_head"]),
        Quantization(scheme=scheme, group_size=32, observer=observer),
    ]
    session = Session(model, modifiers)
    session.run_oneshot(calibration)
    for name, mask in session.masks.items():
        q = session.quantization[name.removesuffix(".weight")].quantized_weight
        assert (q[~mask] == 0).all()
        assert abs((~mask).float().mean() - 0.6) < 1e-3


def plant(model, name: str) -> None:
    """Make one input channel of a down_proj huge."""
    block, _, _ = name.partition(".mlp")
    model.get_submodule(f"{block}.mlp.up_proj").weight.data[3] *= 500


def test_skip_finds_a_planted_outlier_and_records_it(pico, calibration):
    model = pico(layers=4)
    planted = "model.layers.2.mlp.down_proj"
    plant(model, planted)
    before = model.get_submodule(planted).weight.detach().clone()
    session = Session(model, [Quantization(dynamic=False, skip={"by": "input_range", "top": 1})])
    session.run_oneshot(calibration)
    assert session.report["Quantization"]["skipped"] == [planted]
    ranges = session.report["Quantization"]["input_range"]
    assert next(iter(ranges)) == planted
    assert list(ranges.values()) == sorted(ranges.values(), reverse=True)
    assert len(session.quantization) == 27
    assert planted not in session.quantization
    assert torch.equal(model.get_submodule(planted).weight, before)


def test_config_groups_and_scheme_mix(pico, calibration):
    group = {
        "targets": ["down_proj"],
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
    }
    session = Session(pico(), [Quantization(scheme="W8A8", config_groups={"low": group})])
    session.run_oneshot(calibration)
    schemes = {
        name.rpartition(".")[2]: layer.scheme for name, layer in session.quantization.items()
    }
    assert schemes["down_proj"] == "W4A16"
    assert schemes["up_proj"] == "W8A8"
    assert session.report["Quantization"]["layers"] == {"W8A8": 12, "W4A16": 2}


def test_groups_that_do_not_divide_are_an_error(pico, calibration):
    with pytest.raises(
        ModelError, match="32 inputs, no multiple of group_size 128; group_size: 32 fits"
    ):
        Session(pico(), [Quantization(scheme="W4A16")]).run_oneshot(calibration)


def test_quantizing_twice_and_skipping_all_are_errors(pico, calibration):
    with pytest.raises(ModelError, match="is quantized already"):
        Session(pico(), [Quantization(), Quantization()]).run_oneshot(calibration)
    with pytest.raises(ModelError, match="would leave all 14 layers"):
        session = Session(pico(), [Quantization(skip={"by": "input_range", "top": 14})])
        session.run_oneshot(calibration)


def test_a_quantized_model_is_not_trained(pico, calibration):
    model = pico()
    session = Session(model, [Quantization()])
    session.run_oneshot(calibration)
    with pytest.raises(ModelError, match="can't be trained"):
        Session(model, [], quantization=session.quantization).begin(1, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "W3A3"},
        {"skip": {"by": "magic", "top": 1}},
        {"skip": {"by": "input_range", "top": 0}},
        {
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
            }
        },
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"symmetric": False}}}},
        {
            "config_groups": {
                "a": {
                    "targets": ["Linear"],
                    "weights": {},
                    "input_activations": {"dynamic": True, "strategy": "tensor"},
                }
            }
        },
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        Quantization(**settings)


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def steps(session: Session, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        session.before_step()
        data = batch(session.step)
        outputs = session.model(**data)
        session.loss(outputs.loss, data, outputs).backward()
        session.before_optimizer(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(optimizer)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_aware_linear_computes_integers_and_gradients_pass(pico, scheme, dynamic):
    model = pico()
    session = Session(model, [Quantization(scheme=scheme, dynamic=dynamic, group_size=16)])
    session.begin(1, 1)
    session.before_step()
    linear = model.get_submodule(UP)
    x = torch.randn(3, 32, requires_grad=True)
    y = linear(x)
    bits = int(scheme[1])
    weight = linear.weight.detach()
    groups = weight.reshape(64, -1, 16)
    scale = (groups.abs().amax(dim=2, keepdim=True) / ((2**bits - 1) / 2)).half().float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded = ((groups / scale).round().clamp(low, high) * scale).reshape(64, 32)
    value = x.detach()
    if scheme == "W8A8" and dynamic:
        value = fake_quantize_dynamic(value)
    elif scheme == "W8A8":
        observer = MinMax()
        observer.add(value)
        value = fake_quantize_static(value, *observer.qparams())
    assert torch.equal(y, value @ rounded.T)
    y.sum().backward()
    assert torch.allclose(x.grad, rounded.sum(dim=0).expand(3, 32), atol=1e-5)
    assert torch.allclose(linear.weight.grad, value.sum(dim=0).expand(64, 32), atol=1e-5)
    assert torch.equal(linear.weight, weight)  # itself it stays in floating point


def test_aware_training_ends_on_the_grid_and_computes_the_same(pico):
    model = pico()
    modifiers = [MagnitudePruning(sparsity=0.5, ignore=["lm_head"]), Quantization(end=2.0)]
    session = Session(model, modifiers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    session.begin(2, 6)
    steps(session, optimizer, 3)
    assert not session.quantization
    linear = model.get_submodule(UP)
    x = torch.randn(3, 32)
    steps(session, optimizer, 1)
    session.modifiers[1].on_update(session)  # the scales of the weights as they are now
    with torch.no_grad():
        before = linear(x)
    steps(session, optimizer, 1)
    layer, weight = session.quantization[UP], linear.weight.detach().clone()
    with torch.no_grad():
        assert torch.equal(linear(x), before)
    assert layer.scheme == "W8A8"
    steps(session, optimizer, 1)  # after its end: integers are trained no more, other weights are
    session.finish()
    assert torch.equal(linear.weight, weight)
    q = layer.quantized_weight
    assert torch.equal(q * layer.scale, weight)
    assert len(session.quantization) == 14
    for name, mask in session.masks.items():
        assert (~mask).any()
        integers = session.quantization[name.removesuffix(".weight")].quantized_weight
        assert (integers[~mask] == 0).all()
    assert session.report["Quantization"]["layers"] == {"W8A8": 14}


def test_a_frozen_observer_keeps_its_scales(pico):
    model = pico()
    modifier = Quantization(dynamic=False, freeze_observer=1.0)
    session = Session(model, [modifier])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session.begin(2, 4)
    steps(session, optimizer, 1)
    first = modifier._aware[UP].scale
    steps(session, optimizer, 1)
    aware = modifier._aware[UP]
    scale, inputs = aware.scale, (aware.inputs.low, aware.inputs.high)
    assert not torch.equal(scale, first)
    steps(session, optimizer, 2)
    session.finish()
    layer = session.quantization[UP]
    assert torch.equal(layer.scale, scale)
    assert (aware.inputs.low, aware.inputs.high) == inputs
    assert torch.equal(layer.input_scale, aware.inputs.qparams()[0])
    assert inputs[0] < 0 < inputs[1]


def test_aware_training_that_can_not_work_is_an_error(pico):
    with pytest.raises(ModelError, match="skip measures layers in a one-shot stage"):
        Session(pico(), [Quantization(skip={"by": "input_range", "top": 1})]).begin(1, 1)
    with pytest.raises(ModelError, match="but the stage has 1 steps"):
        Session(pico(), [Quantization(start=2.0)]).begin(1, 1)
    with pytest.raises(ValidationError, match="between start and end"):
        Quantization(start=1.0, freeze_observer=0.5)


def test_quantized_weights_are_carried_through_training_only_frozen(pico, calibration):
    model = pico()
    session = Session(model, [Quantization()])
    session.run_oneshot(calibration)
    frozen = TrainableParams(targets=["Linear"], ignore=["lm_head"])
    for window in ({"end": 1.0}, {"start": 1.0}):
        late = frozen.model_copy(update=window)
        with pytest.raises(ModelError, match="can't be trained"):
            Session(model, [late], quantization=session.quantization).begin(1, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session = Session(model, [frozen], quantization=session.quantization)
    session.begin(1, 2)
    steps(session, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5), 2)
    session.finish()
    for name, parameter in model.named_parameters():
        quantized = name.removesuffix(".weight") in session.quantization
        assert torch.equal(parameter, before[name]) == quantized
