from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paring.errors import RecipeError
from paring.modifiers import ModifierError
from paring.recipes import DataConfig, Recipe, Stage, TrainingConfig

pytestmark = pytest.mark.usefixtures("pico")

RECIPE = """
version: 1
model: zoo:pico
args: {sparsity: 0.5, epochs: 2, half: "${sparsity / 2}"}
stages:
  - name: prune
    run: oneshot
    data: {dataset: zoo:python-docs, samples: 64}
    modifiers:
      - PicoPruning: {sparsity: ${sparsity}, mask_structure: 2:4, ignore: [lm_head]}
      - PicoQuantizationModifier: {skip: {by: input_range, top: 5}}
  - run: oneshot
    modifiers:
      - PicoQuantization:
  - name: recover
    run: train
    data: {dataset: some.jsonl, prompt: "Q: {question}", answer: "{answer}"}
    training: {epochs: "${epochs}", batch_size: 8, learning_rate: 1e-4}
    modifiers:
      - PicoTeacher: {start: ${epochs / 4}, end: ${epochs}}
evaluate: {dataset: zoo:python-docs, split: test, windows: 10}
"""


def problems(text: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "bad.yaml", **options)
    return [str(problem) for problem in caught.value.problems]


def oneshot(modifier: str) -> str:
    return f"stages:\n  - run: oneshot\n    modifiers:\n      - {modifier}\n"


def train(modifier: str, epochs: str = "2") -> str:
    return (
        "stages:\n  - run: train\n    data: {dataset: x}\n"
        f"    training: {{epochs: {epochs}, batch_size: 1, learning_rate: 1}}\n"
        f"    modifiers:\n      - {modifier}\n"
    )


def test_a_whole_recipe() -> None:
    recipe = Recipe.parse(RECIPE)
    prune, again, recover = recipe.stages
    assert recipe.args == {"sparsity": 0.5, "epochs": 2, "half": 0.25}
    pruning: Any = prune.modifiers[0]
    assert (pruning.sparsity, pruning.mask_structure) == (0.5, "2:4")
    assert again.name == "oneshot"
    assert again.data == prune.data  # the data of the one-shot stage before
    assert recover.training is not None
    assert type(recover.training.epochs) is float
    assert (recover.modifiers[0].start, recover.modifiers[0].end) == (0.5, 2)
    assert recipe.export.head == "keep"


def test_the_resolved_recipe_loads_to_the_same() -> None:
    recipe = Recipe.parse(RECIPE)
    written = recipe.to_yaml()
    assert "${" not in written
    assert Recipe.parse(written) == recipe
    assert Recipe.parse(written).to_yaml() == written
    other = Recipe.parse(RECIPE, set={"sparsity": 0.6})
    assert other != recipe
    assert Recipe.parse(other.to_yaml()) == other


def test_five_mistakes_are_five_located_problems() -> None:
    text = """version: 1
modle: zoo:pico
args: {sparsity: 0.5}
stages:
  - run: oneshto
    modifiers:
      - PicoPrunning: {sparsity: 0.5}
      - PicoPruning: {sparsity: ${sparsty}}
      - PicoPruning: {sparsity: 1.5, mask_structure: 2:4}
"""
    assert problems(text) == [
        "bad.yaml:2:1: unknown key 'modle' in the recipe; did you mean 'model'?",
        "bad.yaml:5:10: run is unknown, got 'oneshto'; did you mean 'oneshot'?",
        "bad.yaml:7:9: unknown modifier 'PicoPrunning'; did you mean 'PicoPruning'?",
        "bad.yaml:8:33: unknown name 'sparsty' in '${sparsty}'; did you mean 'sparsity'?",
        "bad.yaml:9:33: sparsity is too large, got 1.5; use at most 1",
    ]


@pytest.mark.parametrize(
    ("modifier", "problem"),
    [
        ("PicoPruning: {}", "4:9: 'PicoPruning' needs 'sparsity'; add it"),
        ("PicoPruning:", "4:9: 'PicoPruning' needs 'sparsity'; add it"),
        ("PicoPruning: {sparsity: high}", "4:33: sparsity is the wrong kind of value, got 'high'"),
        ("PicoPruning: {sparsity: '0.5'}", "got '0.5'; write it without quotes: 0.5"),
        ("PicoPruning: {sparsity: .nan}", "4:33: not a finite number, got nan"),
        ("PicoPruning: {sparsity: 1, ignore: x}", "got 'x'; write a list: [x]"),
        ("PicoPruning: {sparsity: 1, ignore: [a, 2]}", "4:48: ignore[1] is the wrong kind"),
        ("PicoPruning: {sparsity: 1, mask_structure: 4}", "got 4; write it in quotes: '4'"),
        (
            "PicoPruning: {sparsity: 1, update_target: 4}",
            "update_target is the wrong kind of value, got 4; write a text or a list",
        ),
        ("PicoPruning: {sparsity: 1, update_target: [4]}", "4:52: update_target[0] is the wrong"),
        ("PicoPruning: {sparsity: 1, sparsity: 0}", "4:36: duplicate key 'sparsity', first at"),
        ("PicoPruning: {sparsity: 1, sparcity: 0}", "4:36: unknown key 'sparcity' in PicoPruning"),
        ("PicoQuantization: {scheme: W8A9}", "scheme is unknown, got 'W8A9'; did you mean 'W8A8'?"),
        ("PicoQuantization: {scheme: int3}", "got 'int3'; use 'W8A8' or 'W4A16'"),
        ("PicoQuantization: {skip: {by: input_rage, top: 1}}", "did you mean 'input_range'?"),
        ("PicoQuantization: {skip: {by: input_range, topp: 1}}", "did you mean 'top'?"),
        ("PicoQuantization: {skip: {by: input_range}}", "4:28: 'skip' needs 'top'; add it"),
        ("PicoQuantization: {group_size: 1.5}", "got 1.5; write a whole number"),
        (
            "PicoQuantization: {start: 1}",
            "4:28: 'start' is about time and a one-shot stage has none",
        ),
        ("PicoTeacher: {}", "4:9: PicoTeacher does not work in a oneshot stage"),
        ("!PicoQuantization {}", "4:9: tag '!PicoQuantization' has no meaning here"),
        ("PicoQuantization", "a modifier is a mapping, got 'PicoQuantization'; write 'Pico"),
        ("7", "4:9: a modifier is a mapping, got 7"),
    ],
)
def test_a_mistake_in_a_modifier(modifier: str, problem: str) -> None:
    found = problems(oneshot(modifier))
    assert problem in found[0]
    assert found[0].startswith("bad.yaml:4:")
    assert len(found) == (2 if modifier.startswith("!") else 1)


@pytest.mark.parametrize(
    ("modifier", "problem"),
    [
        ("PicoTeacher: {end: 3}", "6:23: end is after the stage ends, got 3; it has 2 epochs"),
        ("PicoTeacher: {start: 2}", "6:23: start is not before the stage ends, got 2; it has 2"),
        ("PicoTeacher: {start: 1, end: 0.5}", "6:38: end (0.5) must come after start (1)"),
        ("PicoTeacher: {start: -1}", "6:30: start is too small, got -1; use at least 0"),
        ("PicoQuantization: {}", "6:9: PicoQuantization does not work in a train stage"),
    ],
)
def test_a_mistake_in_time(modifier: str, problem: str) -> None:
    (found,) = problems(train(modifier))
    assert problem in found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["bad.yaml:1:1: the file is empty"]),
        ("- a", ["bad.yaml:1:1: a recipe is a mapping"]),
        ("version: 2\nstages: []", ["2:9: a recipe without stages", "1:10: version is unknown, got 2"]),
        ("version: 1", ["bad.yaml:1:1: 'the recipe' needs 'stages'"]),
        ("stages: {run: oneshot}", ["stages is the wrong kind of value, got {'run': 'oneshot'}; write a"]),
        ("stages: [oneshot]", ["a stage is a mapping, got 'oneshot'"]),
        ("stages: [{run: oneshot}]", ["a one-shot stage without modifiers does nothing"]),
        ("stages: [{run: train}]", ["needs 'training'", "needs 'data'"]),
        ("args: 5\n" + oneshot("PicoQuantization: {}"), ["args is no mapping, got 5"]),
        ("args: {a-b: 5}\n" + oneshot("PicoQuantization: {}"), ["an arg's name must fit in ${...}"]),
        ("args: {a: {b: 5}}\n" + oneshot("PicoQuantization: {}"), ["arg 'a' is no single value"]),
        ("args: {a: '${b}', b: 1}\n" + oneshot("PicoQuantization: {}"), ["unknown name 'b'"]),
        (oneshot("PicoQuantization: {}") + "export: {head: int4}", ["5:16: head is unknown"]),
        (
            "stages:\n" + "  - {run: oneshot, modifiers: [PicoQuantization: {}]}\n" * 2,
            ["3:5: two stages are named 'oneshot'; give each its own 'name'"],
        ),
        (
            "stages:\n  - run: oneshot\n    modifiers:\n    - PicoPruning:\n      sparsity: 1\n",
            ["4:7: a modifier has one key, its name, got 'PicoPruning' and 'sparsity'; indent"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere(text: str, found: list[str]) -> None:
    shown = problems(text)
    assert len(shown) == len(found)
    for part in found:
        assert any(part in problem for problem in shown), shown


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("{dataset: x, answer: '{a}'}", "3:32: 'answer' needs a 'prompt'; add one"),
        ("{dataset: x, text: a, prompt: '{a}'}", "exclude each other"),
        ("{dataset: x, prompt: '{a'}", "'prompt' is no template"),
        ("{dataset: x, prompt: 'Q: {}'}", "name a column"),
        ("{dataset: x, windows: 3}", "'windows' is for 'evaluate'; use 'samples' here"),
        ("{dataset: x, samples: 0}", "samples is too small, got 0; use at least 1"),
        ("{dataset: x, lenght: 512}", "unknown key 'lenght' in data; did you mean 'length'?"),
        ("{dataset: ''}", "data needs either 'dataset' or 'mixture'; give one of them"),
        ("{split: test}", "3:11: data needs either 'dataset' or 'mixture'; give one of them"),
        ("{mixture: [{dataset: x}]}", "3:22: 'mixture[0]' needs 'weight'; add it"),
        ("{mixture: [{dataset: x, weight: 0}]}", "weight is too small, got 0"),
        ("{dataset: x, buffer_size: 9}", "'buffer_size' is for 'streaming'"),
        ("{dataset: x, stopping_strategy: all_exhausted}", "is for a 'mixture'; remove it"),
        (
            "{dataset: x, prompt: '{a}', answer: '{b}', packing: true}",
            "'packing' is for training; remove it",
        ),
    ],
)
def test_a_mistake_in_data(data: str, problem: str) -> None:
    text = f"stages:\n  - run: oneshot\n    data: {data}\n    modifiers: [PicoQuantization: {{}}]\n"
    (found,) = problems(text)
    assert problem in found


@pytest.mark.parametrize(
    ("evaluate", "problem"),
    [
        ("{dataset: x, samples: 3}", "counts a text in 'windows', not in 'samples'"),
        (
            "{dataset: x, prompt: '{a}', answer: '{b}', windows: 3}",
            "counts answers in 'samples', not in 'windows'",
        ),
    ],
)
def test_a_mistake_in_evaluate(evaluate: str, problem: str) -> None:
    (found,) = problems(oneshot("PicoPruning: {sparsity: 0.5}") + f"evaluate: {evaluate}\n")
    assert problem in found


def test_yaml_1_1_words_for_booleans_are_told_apart() -> None:
    text = train("PicoTeacher: {}").replace("learning_rate: 1", "learning_rate: 1, bf16: no")
    (found,) = problems(text)
    assert "got 'no'; write false" in found


def test_the_epochs_of_a_stage_come_before_an_arg_of_that_name() -> None:
    text = "args: {epochs: 7}\n" + train("PicoTeacher: {end: ${epochs}}", "${epochs - 4}")
    assert Recipe.parse(text).stages[0].modifiers[0].end == 3
    text = "args: {epochs: 7}\n" + oneshot("PicoPruning: {sparsity: ${epochs / 10}}")
    assert Recipe.parse(text).to_yaml().count("0.7") == 1


def test_the_model_can_be_given() -> None:
    assert Recipe.parse(RECIPE, model="folder").model == "folder"


def test_a_recipe_made_in_python_is_checked_too(pico: dict[str, Any]) -> None:
    data = DataConfig(dataset="x")
    training = TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-4)
    teacher = pico["PicoTeacher"]
    recipe = Recipe(
        stages=[Stage(run="train", data=data, training=training, modifiers=[teacher()])]
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe
    with pytest.raises(ValueError, match=r"modifiers\.0\.end: end is after the stage ends"):
        Stage(run="train", data=data, training=training, modifiers=[teacher(end=3)])
    with pytest.raises(ValueError, match="without stages"):
        Recipe(stages=[])


def test_use_runs_a_file_of_modifiers(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise SystemError('it ran')\n")
    with pytest.raises(ModifierError, match="it ran"):
        Recipe.parse(RECIPE, use=[file])


def test_a_recipe_never_runs_code(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for value in (
        f"!!python/object/apply:os.mkdir ['{witness}']",
        f"${{__import__('os').mkdir('{witness}')}}",
        f"eval(__import__('os').mkdir('{witness}'))",
    ):
        assert problems(oneshot(f"PicoPruning: {{sparsity: {value}}}"))
    assert not witness.exists()
