from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paring.cli import application
from paring.cli.plan import bar
from paring.errors import RecipeError
from paring.modifiers.schedule import ramp
from paring.recipes import Recipe
from paring.recipes.library import entries
from paring.recipes.plan import Plan, Row
from paring.recipes.plan_picture import draw, render

RECIPE = """
model: zoo:pico
stages:
  - name: prepare
    run: oneshot
    data: {dataset: zoo:python-docs, samples: 8, length: 64}
    modifiers:
      - SmoothQuant: {smoothing_strength: 0.5}
      - SparseGPT: {sparsity: 0.5, ignore: [lm_head]}
      - ConstantPruning:
      - Quantization: {skip: {by: input_range, top: 2}}
  - name: recover
    run: train
    data: {dataset: x.jsonl, prompt: "{q}", answer: "{a}"}
    training: {epochs: 4, batch_size: 2, learning_rate: 1e-4, gradient_accumulation: 3}
    modifiers:
      - SquareHead: {teacher: self, start: 1}
      - MagnitudePruning: {init_sparsity: 0.2, final_sparsity: 0.8, start: 1, end: 3, update_frequency: 0.5}
evaluate: {dataset: zoo:python-docs, split: test}
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.of(Recipe.parse(RECIPE), "mine")


def test_a_oneshot_stage_is_the_walks_that_the_session_makes(plan: Plan) -> None:
    walks = [(walk.what, [row.name for row in walk.rows]) for walk in plan.stages[0].walks]
    assert walks == [
        ("block by block", ["SmoothQuant", "SparseGPT"]),
        ("the whole model at once", ["ConstantPruning"]),
        ("look at every block", ["Quantization"]),
        ("block by block", ["Quantization"]),
    ]
    families = [row.family for walk in plan.stages[0].walks for row in walk.rows]
    assert families == ["smoothing", "pruning", "pruning", "quantization", "quantization"]


def test_a_training_stage_is_rows_on_the_epochs_axis(plan: Plan) -> None:
    head, pruning = plan.stages[1].rows
    assert (head.start, head.end, head.pace) == (1, 4, "every step")
    assert head.settings == "teacher self"
    assert (pruning.start, pruning.end, pruning.every) == (1, 3, 0.5)
    assert pruning.pace == "0.2 to 0.8 every 0.5 epochs"
    epochs = [1, 1.5, 2, 2.5, 3]
    assert [epoch for epoch, _ in pruning.curve] == epochs
    expected = [ramp("cubic", 0.2, 0.8, (epoch - 1) / 2) for epoch in epochs]
    assert [sparsity for _, sparsity in pruning.curve] == pytest.approx(expected)
    assert plan.stages[1].ticks == [0, 1, 2, 3, 4]
    assert plan.stages[1].about == (
        "4 epochs · batch 2 x 3 · learning rate 0.0001 linear · "
        "x.jsonl, all answers, up to 512 tokens"
    )


def test_a_bar_is_drawn_where_its_row_acts() -> None:
    assert bar(Row("a", "", "", 1, 3), 4, 8) == "  ━━━━  "
    ramped = Row("a", "", "", 1, 3, 1, ((1, 0.25), (2, 0.5), (3, 1.0)))
    assert bar(ramped, 4, 8) == "  ▃▃▅▅██"  # what is pruned stays pruned after the end


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_every_library_recipe_can_be_planned(entry: object) -> None:
    name = entry.name  # type: ignore[attr-defined]
    done = CliRunner().invoke(application(), ["plan", name])
    assert done.exit_code == 0, done.output
    recipe = Recipe.load(name)
    assert done.stdout.startswith(f"{name} · {recipe.model}\n")
    for stage in recipe.stages:
        assert f"{stage.name} · {stage.run}" in done.stdout
        for modifier in stage.modifiers:
            assert modifier.key() in done.stdout


def test_the_picture_says_what_the_plan_says(plan: Plan) -> None:
    figure = draw(plan)
    texts = {text.get_text() for text in figure.texts}
    texts |= {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"mine · zoo:pico", "1  prepare", "2  recover", "SmoothQuant", "block by block"} <= texts
    assert {"SquareHead", "MagnitudePruning", "0.2 to 0.8 every 0.5 epochs", "epoch", "4"} <= texts
    assert len(figure.axes) == 2


def test_the_picture_is_png_or_svg_and_always_the_same(plan: Plan) -> None:
    png, svg = render(plan, "png"), render(plan, "svg")
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg
    assert render(plan, "png") == png
    assert render(plan, "svg") == svg


def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    def run(name: str) -> BaseException | None:
        words = ["plan", "smollm2-w8a8", "--picture", str(tmp_path / name)]
        return CliRunner().invoke(application(), words).exception

    assert run("plan.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    assert isinstance(run("plan.gif"), RecipeError)
    assert isinstance(run("no/plan.svg"), RecipeError)


TIMED = """
stages:
  - run: train
    data: {dataset: x.txt, samples: 40}
    training: {epochs: 2, batch_size: 4, learning_rate: 1e-4}
    modifiers:
      - LearningRate: {init_lr: 0.1, final_lr: 0.0, unit: steps, start: 5, end: 15}
      - MagnitudePruning: {milestones: {0.5: 0.3, 1: 0.6}}
      - TrainableParams: {targets: [embed_tokens], end: 1}
"""


def test_steps_milestones_and_rates_are_on_the_timeline() -> None:
    recipe = Recipe.parse(TIMED)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    rate, pruning, frozen = Plan.of(recipe).stages[0].rows
    assert (rate.start, rate.end) == (0.5, 1.5)  # 10 steps an epoch
    assert rate.pace == "0.1 to 0 every step from step 5 to 15"
    assert rate.curve[0] == (0.5, 0.1)
    assert rate.curve[-1] == (1.5, 0.0)
    assert not rate.lasting
    assert pruning.pace == "0 to 0.6 every step"
    at = dict(pruning.curve)
    assert (at[0.0], at[0.5], at[1.0], at[2.0]) == (0.0, 0.3, 0.6, 0.6)
    assert max(value for time, value in pruning.curve if time < 0.5) == 0.0
    assert (frozen.family, frozen.end, frozen.curve) == ("training", 1, ())
    assert render(Plan.of(recipe), "svg")
    unknown = Recipe.parse(TIMED.replace(", samples: 40", ""))
    row = Plan.of(unknown).stages[0].rows[0]
    assert (row.start, row.end, row.curve) == (0, 2, ())
    assert row.pace == "every step from step 5 to 15"
    with pytest.raises(RecipeError, match="milestones go on after the stage ends, got 3"):
        Recipe.parse(TIMED.replace("1: 0.6", "3: 0.6"))


def test_a_training_without_modifiers_has_a_picture() -> None:
    picture = render(Plan.of(Recipe.load("smollm2-dense-finetune")), "svg").decode()
    assert "<svg" in picture
