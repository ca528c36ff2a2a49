"""Each observer against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.quantization.histogram import LeastError, Percentile, input_observer
from paring.modifiers.quantization.layer import (
    dequantize_weight,
    fake_quantize_static,
    half_exact,
    quantize_weight,
)
from paring.modifiers.quantization.observers import MinMax, qparams, weight_scale
from paring.modifiers.quantization.quantization import Quantization
from paring.modifiers.quantization.schemes import InputArgs, WeightArgs


def skewed(count: int = 100_000) -> torch.Tensor:
    """Inputs with a few far outliers, more of them above than below."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, generator=generator) + 0.5
    x[:2] = torch.tensor([17.0, 23.0])
    x[20:25] *= -6
    return x.reshape(-1, 32)


def static_error(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> float:
    return float((fake_quantize_static(x, scale, zero_point) - x).double().square().sum())


def test_minmax_of_inputs_is_what_was_seen():
    x = skewed()
    observer = MinMax()
    for part in x.split(1000):
        observer.add(part)
    assert (observer.low, observer.high) == (float(x.min()), float(x.max()))


def test_percentile_of_inputs_is_the_sorted_values_percentile():
    x = torch.cat([skewed(1_600_000).flatten(), torch.full((40,), 900.0)]).reshape(-1, 40)
    observer = Percentile()
    for part in x.split(9999):
        observer.add(part)
    ordered = x.flatten().sort().values
    cut = ordered.numel() * 1e-5 / 2  # at each end
    low, high = float(ordered[int(cut)]), float(ordered[-1 - int(cut)])
    wanted, zero = qparams(low, high)
    scale, zero_point = observer.qparams()
    assert float(scale) == pytest.approx(float(wanted), rel=2**-8)
    assert abs(int(zero_point) - int(zero)) <= 1


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_mse_of_inputs_finds_what_brute_force_finds(factor):
    x = skewed() * factor
    observer = LeastError()
    for part in x.split(1000):
        observer.add(part)
    low, high = float(x.min()), float(x.max())
    shrink = [0.92**n for n in range(24)]
    best = min(
        static_error(x, *qparams(low * a, high * b)) for a, b in itertools.product(shrink, shrink)
    )
    found = static_error(x, *observer.qparams())
    assert found <= 1.01 * best
    assert found < 0.95 * static_error(x, *qparams(low, high))


def test_observers_of_inputs_that_are_all_zero_or_one_sided():
    for name in ("minmax", "percentile", "mse"):
        observer = input_observer(name)
        observer.add(torch.zeros(4, 8))
        scale, zero_point = observer.qparams()
        assert torch.equal(fake_quantize_static(torch.zeros(3), scale, zero_point), torch.zeros(3))
        observer = input_observer(name)
        observer.add(torch.linspace(1, 2, 4000).reshape(-1, 8))
        assert int(observer.qparams()[1]) == -128  # 0 is on the grid, at its end


def test_inputs_that_are_not_finite_are_an_error():
    observer = LeastError()
    observer.add(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ModelError, match="NaN or infinity"):
        observer.qparams()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_of_weights_finds_what_brute_force_finds(bits, weighted):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(4, 32, generator=generator) ** 3
    importance = torch.rand(32, generator=generator) ** 4
    args = WeightArgs(
        num_bits=bits,
        strategy="group",
        group_size=16,
        observer="imatrix_mse" if weighted else "mse",
    )
    counts = importance if weighted else torch.ones(32)
    scale = weight_scale(weight, 16, args, importance if weighted else None)
    for row, group in itertools.product(range(4), range(2)):
        part = slice(16 * group, 16 * group + 16)
        w, c = weight[row : row + 1, part], counts[part]

        def error(s: torch.Tensor, w: torch.Tensor = w, c: torch.Tensor = c) -> float:
            q = quantize_weight(w, s.reshape(1, 1), bits)
            return float(((dequantize_weight(q, s.reshape(1, 1)) - w).square() * c).sum())

        widest = (w.abs().max() / ((2**bits - 1) / 2)).half().float()
        best = min(error((widest * f).half().float()) for f in torch.linspace(0.2, 1, 81)[1:])
        assert error(scale[row, group]) == pytest.approx(best, rel=1e-3)


def test_percentile_of_weights_is_torch_quantile():
    weight = torch.randn(3, 4000, generator=torch.Generator().manual_seed(2)) ** 3
    scale = weight_scale(weight, 0, WeightArgs(observer="percentile"))
    ordered = weight.abs().sort(dim=1).values
    position = 0.999 * 3999
    first = int(position)
    step = ordered[:, first + 1] - ordered[:, first]
    expected = (ordered[:, first] + (position - first) * step) / 127.5
    assert torch.allclose(scale[:, 0], expected)


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_a_static_scheme_uses_its_input_observer(pico, calibration, observer):
    name = "model.layers.0.self_attn.k_proj"
    seen = []
    model = pico()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(calibration)
    handle.remove()
    expected = input_observer(observer)
    expected.add(torch.cat(seen))
    session = Session(model, [Quantization(dynamic=False, input_observer=observer)])
    session.run_oneshot(calibration)
    layer = session.quantization[name]
    assert torch.equal(layer.input_scale, expected.qparams()[0])
    assert torch.equal(layer.input_zero_point, expected.qparams()[1])


def test_imatrix_mse_needs_no_more_than_its_name(pico, calibration):
    results = {}
    for name in ("mse", "imatrix_mse"):
        session = Session(pico(), [Quantization(scheme="W4A16", group_size=16, observer=name)])
        session.run_oneshot(calibration)
        results[name] = torch.cat([q.scale.flatten() for q in session.quantization.values()])
    assert not torch.equal(results["mse"], results["imatrix_mse"])


def test_observers_where_there_is_nothing_to_observe_are_refused(pico):
    with pytest.raises(ValidationError, match="dynamic: false"):
        Quantization(input_observer="mse")
    with pytest.raises(ValidationError, match="static inputs"):
        InputArgs(observer="mse")
    with pytest.raises(ModelError, match="in training"):
        Session(pico(), [Quantization(observer="imatrix_mse")]).begin(1, 1)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "imatrix_mse"])
def test_scales_of_groups_are_exact_in_float16(observer):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 64, generator=generator) * 0.02
    weight[0, :16] = 0
    importance = torch.rand(64, generator=generator)
    args = WeightArgs(num_bits=4, strategy="group", group_size=16, observer=observer)
    scale = weight_scale(weight, 16, args, importance)
    assert torch.equal(scale, scale.half().float())
    assert (scale > 0).all()
    per_row = weight_scale(weight, 0, WeightArgs(observer=observer), importance)
    assert not torch.equal(per_row, per_row.half().float())


def test_a_scale_that_float16_can_not_hold_stays_float32():
    scale = torch.tensor([[1e-9, 1e-7, 0.1, 60000.0, 1e5]])
    rounded = torch.tensor([[1e-9, 2.0**-23, 0.1, 60000.0, 1e5]])
    rounded[0, 2] = rounded[0, 2].half()
    assert torch.equal(half_exact(scale), rounded)
    assert torch.equal(half_exact(scale.T), scale.T)  # one per row
