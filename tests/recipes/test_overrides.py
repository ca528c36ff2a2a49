from __future__ import annotations

from typing import Any

import pytest

from paring.errors import RecipeError
from paring.recipes import Recipe

pytestmark = pytest.mark.usefixtures("pico")

RECIPE = """
args: {share: 0.5, count: 2, scheme: W8A8, on: true, layers: [lm_head], nothing: null, sum: "${count + 1}"}
stages: [{run: oneshot, modifiers: [PicoPruning: {sparsity: "${share}"}]}]
"""


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("share", "0.7", 0.7),
        ("share", "1", 1.0),
        ("share", 1, 1.0),
        ("share", "7e-1", 0.7),
        ("count", "3", 3),
        ("count", " 3 ", 3),
        ("scheme", "3", "3"),
        ("scheme", "no", "no"),
        ("on", "false", False),
        ("layers", "[a, b]", ["a", "b"]),
        ("layers", ["a"], ["a"]),
        ("nothing", "5", 5),
        ("nothing", "text", "text"),
        ("sum", "9", 9),
    ],
)
def test_a_value_takes_the_type_of_the_arg(name: str, given: Any, value: Any) -> None:
    found = Recipe.parse(RECIPE, set={name: given}).args[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "problem"),
    [
        (
            "count",
            "2.5",
            "--set count=2.5: arg 'count' is a whole number (2 in the recipe), got '2.5'",
        ),
        ("count", True, "arg 'count' is a whole number"),
        (
            "share",
            "high",
            "--set share=high: arg 'share' is a number (0.5 in the recipe), got 'high'",
        ),
        (
            "on",
            "no",
            "arg 'on' is true or false (true in the recipe), got 'no'; give true or false",
        ),
        ("layers", "lm_head", "arg 'layers' is a list"),
        ("scheme", 5, "arg 'scheme' is a text"),
        ("shrae", "0.7", "--set shrae=0.7: the recipe has no arg 'shrae'; did you mean 'share'?"),
        ("zzz", "1", "args here: share, count, scheme"),
        ("share", "1.5", "r.yaml:3:61: sparsity is too large, got 1.5; use at most 1"),
    ],
)
def test_a_wrong_value_is_told(name: str, given: Any, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(RECIPE, "r.yaml", set={name: given})
    (found,) = caught.value.problems
    assert problem in str(found)


def test_args_below_see_the_new_value() -> None:
    assert Recipe.parse(RECIPE, set={"count": "4"}).args["sum"] == 5


def test_all_mistakes_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(RECIPE, set={"count": "x", "shrae": "1", "on": "2"})
    assert len(caught.value.problems) == 3
