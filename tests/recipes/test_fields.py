"""Fields that a modifier has and that mean nothing where they stand."""

from __future__ import annotations

import pytest

from paring.errors import RecipeError
from paring.recipes import Recipe


@pytest.mark.parametrize(
    ("run", "modifier", "problem"),
    [
        ("train", "LearningRate: {init_lr: 0.1, targets: [x]}", "'targets' means nothing to Learn"),
        (
            "train",
            "SquareHead: {teacher: self, update_frequency: 1}",
            "means nothing to SquareHead",
        ),
        ("train", "ConstantPruning: {update_frequency: 1}", "nothing to ConstantPruning"),
        ("train", "TaskLoss: {weight: 0, ignore: [x]}", "'ignore' means nothing to TaskLoss"),
        ("train", "Distillation: {teacher: self, parts: [0]}", "there is none; got 0"),
        ("train", "TaskLoss: {parts: [1]}", "there is none; got 1"),
        ("oneshot", "MagnitudePruning: {sparsity: 0.5, power: 2.0}", "in a training stage alone"),
    ],
)
def test_a_field_that_means_nothing_where_it_stands(run: str, modifier: str, problem: str) -> None:
    training = "{epochs: 2, batch_size: 1, learning_rate: 1}"
    lines = ["stages:", f"  - run: {run}", "    data: {dataset: x}", f"    modifiers: [{modifier}]"]
    if run == "train":
        lines.append(f"    training: {training}")
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("\n".join(lines), "bad.yaml")
    (found,) = caught.value.problems
    assert problem in str(found)
