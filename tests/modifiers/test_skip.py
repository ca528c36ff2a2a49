"""Which layers stay in floating point: scores against plain measuring, the budget against trying all choices."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from paring.errors import ModelError, RecipeError
from paring.modifiers import Session
from paring.modifiers.blocks import Stream
from paring.modifiers.quantization.gptq import GPTQ
from paring.modifiers.quantization.layer import fake_quantize_dynamic, fake_quantize_static
from paring.modifiers.quantization.observers import MinMax
from paring.modifiers.quantization.quantization import Quantization
from paring.modifiers.quantization.schemes import preset
from paring.modifiers.quantization.sensitivity import noise, output_error
from paring.modifiers.quantization.skip import Share, Skip, best_under_budget, first_that_fit
from paring.modifiers.smoothing.smoothquant import SmoothQuant
from paring.recipes import Recipe

DOWN = "model.layers.1.mlp.down_proj"


def plant(model):
    """One channel of one down_proj's input a thousand times the others', as attention sinks make."""
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[7] *= 3000
    model.get_submodule(DOWN).weight.data[:, 7] /= 3000
    return model


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_takes_the_best_of_all_choices(seed):
    draw = random.Random(seed)
    names = [f"layer{i}" for i in range(9)]
    sizes = {name: draw.choice([3, 9, 24, 25]) * 128 for name in names}
    values = {name: draw.random() ** 4 for name in names}
    allowed = int(sum(sizes.values()) * draw.choice([0.02, 0.1, 0.35, 0.6]))
    chosen = best_under_budget(values, sizes, allowed)
    assert sum(sizes[name] for name in chosen) <= allowed
    best = max(
        sum(values[name] for name in some)
        for count in range(len(names))
        for some in itertools.combinations(names, count)
        if sum(sizes[name] for name in some) <= allowed
    )
    assert sum(values[name] for name in chosen) == pytest.approx(best)
    assert chosen == sorted(chosen, key=lambda name: -values[name])


def test_a_budget_holds_where_sizes_have_no_common_divisor():
    draw = random.Random(0)
    sizes = {f"layer{i}": draw.randrange(10**6, 10**7) for i in range(40)}
    values = {name: draw.random() for name in sizes}
    allowed = sum(sizes.values()) // 7
    chosen = best_under_budget(values, sizes, allowed)
    assert sum(sizes[name] for name in chosen) <= allowed
    bound, room = 0.0, allowed  # no choice is better than one that may take parts of layers
    for name in sorted(sizes, key=lambda name: -values[name] / sizes[name]):
        bound += values[name] * min(1, room / sizes[name])
        room -= min(room, sizes[name])
    assert sum(values[name] for name in chosen) > 0.97 * bound


def test_ranges_are_taken_in_order_as_long_as_they_fit():
    sizes = {"a": 50, "b": 60, "c": 30, "d": 20}
    assert first_that_fit(["a", "b", "c", "d"], sizes, 100) == ["a", "c", "d"]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_output_error_is_the_plain_one(pico, calibration, dynamic):
    model = pico()
    block = Stream(model, calibration).block(0)
    scheme = preset("W8A8", ["Linear"], dynamic=dynamic)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = output_error(block, dict.fromkeys(block.linears(["Linear"]), scheme))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())

    linear = block.module.mlp.down_proj
    seen: list[torch.Tensor] = []
    block.run({f"{block.name}.mlp.down_proj": seen.append})
    x = torch.cat(seen).reshape(-1, 64)
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127.5
    q = (linear.weight / step).round().clamp(-128, 127) * step
    observer = MinMax()
    observer.add(x)
    part = x[: 8 * 16]  # of the first two batches of four sequences
    rounded = (
        fake_quantize_dynamic(part) if dynamic else fake_quantize_static(part, *observer.qparams())
    )
    change = rounded @ q.T - part @ linear.weight.T  # is added to the block's output as it is
    y = torch.cat(block.outputs(batches=2)).reshape(-1, 32)
    expected = (change.square().sum(dim=1) / y.square().sum(dim=1)).mean()
    assert found[f"{block.name}.mlp.down_proj"] == pytest.approx(float(expected), rel=1e-3)


@torch.no_grad()
def test_noise_predicts_the_error_of_the_linears_own_output(pico, calibration):
    model = pico()
    block = Stream(model, calibration).block(0)
    scheme = preset("W8A8", ["Linear"])
    found = noise(block, dict.fromkeys(block.linears(["Linear"]), scheme))
    for name, linear in block.linears(["Linear"]).items():
        seen: list[torch.Tensor] = []
        block.run({name: seen.append})
        x = torch.cat(seen).reshape(-1, linear.in_features)
        step = linear.weight.abs().amax(dim=1, keepdim=True) / 127.5
        q = (linear.weight / step).round().clamp(-128, 127) * step
        y = x @ linear.weight.T
        errors = (fake_quantize_dynamic(x) @ q.T - y).square().sum(dim=1) / y.square().sum(dim=1)
        assert found[name] == pytest.approx(float(errors.mean()), rel=0.25)


@pytest.mark.parametrize("cls", [Quantization, GPTQ])
@pytest.mark.parametrize("by", ["input_range", "output_error", "noise"])
@pytest.mark.parametrize("how", [{"top": 1}, {"budget": "12%"}])
def test_every_score_finds_a_planted_outlier(pico, calibration, cls, by, how):
    model = plant(pico())
    session = Session(model, [cls(dynamic=False, skip={"by": by, **how})])
    session.run_oneshot(calibration)
    section = session.report[cls.__name__]
    assert section["skipped"][0] == DOWN
    assert next(iter(section[by])) == DOWN
    assert len(section[by]) == 14
    assert DOWN not in session.quantization
    total = sum(layer.module.weight.numel() for layer in session.quantization.values())
    left = sum(model.get_submodule(name).weight.numel() for name in section["skipped"])
    assert section["skipped_share"] == pytest.approx(left / (left + total))
    assert "budget" not in how or left / (left + total) <= 0.12


def test_skipping_under_a_budget_keeps_the_outputs_nearer(pico, calibration):
    def change(**skip) -> float:
        model = plant(pico())
        with torch.no_grad():
            before = model(calibration).logits
            Session(model, [Quantization(dynamic=False, **skip)]).run_oneshot(calibration)
            return float((model(calibration).logits - before).norm())

    assert change(skip={"budget": 0.12}) < 0.5 * change()


def test_smoothing_and_a_budget_work_together(pico, calibration, tmp_path):
    def modifiers():
        smooth = SmoothQuant(smoothing_strength="auto", dynamic=False)
        return [smooth, Quantization(dynamic=False, skip={"budget": "12%"})]

    def change(steps, **options) -> tuple[float, Session]:
        model = plant(pico())
        with torch.no_grad():
            before = model(calibration).logits
            session = Session(model, steps)
            session.run_oneshot(calibration, **options)
            return float((model(calibration).logits - before).norm()), session

    both, session = change(modifiers())
    assert both < 0.7 * change(modifiers()[1:])[0]
    assert session.report["Quantization"]["skipped_share"] <= 0.12

    def kill(label: str, done: int, total: int, note: str = "") -> None:
        if label.endswith("(observing)") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change(modifiers(), progress=kill, resume_dir=tmp_path)
    again, resumed = change(modifiers(), resume_dir=tmp_path)
    assert again == both
    assert resumed.report == session.report


@pytest.mark.parametrize("value", ["10%", " 10 %", 0.1])
def test_shares_are_numbers_or_percentages(value):
    assert TypeAdapter(Share).validate_python(value) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0},
        {"budget": "0%"},
        {"budget": "101%"},
        {"budget": "100 %"},
        {"budget": 1.5},
        {"budget": "-3%"},
        {"budget": "nan%"},
        {"budget": "three%"},
        {"budget": "inf%"},
        {"budget": True},
        {"budget": [3]},
        {"by": "magic", "budget": "3%"},
        {"budget": "3%", "top": 2},
        {"top": 0},
        {},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        Skip(**settings)


def test_budgets_that_can_not_be_kept_are_errors(pico, calibration):
    def run(skip) -> None:
        Session(pico(), [Quantization(skip=skip)]).run_oneshot(calibration)

    with pytest.raises(ModelError, match=r"budget: 0.0001 is less than the smallest layer"):
        run({"budget": 0.0001})
    with pytest.raises(ModelError, match="would leave all 14 layers"):
        run({"top": 14})


def recipe(skip: str) -> str:
    return f"""\
version: 1
stages:
  - run: oneshot
    modifiers:
      - Quantization:
          skip: {skip}
"""


def test_a_recipe_takes_percentages_and_explains_mistakes():
    loaded = Recipe.parse(recipe("{by: output_error, budget: 3%}"))
    assert loaded.stages[0].modifiers[0].skip.budget == pytest.approx(0.03)
    assert Recipe.parse(loaded.to_yaml()) == loaded
    for skip, message in [
        ("{by: output_errors, top: 1}", "did you mean 'output_error'"),
        ("{budget: 101%}", "budget is too large"),
        ("{budget: 0%}", "use more than 0"),
        ("{budget: many}", "budget"),
        ("{by: noise}", "give either top"),
    ]:
        with pytest.raises(RecipeError, match=message):
            Recipe.parse(recipe(skip))
