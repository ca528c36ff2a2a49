from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from paring import zoo
from paring.errors import RecipeError
from paring.recipes import Recipe
from paring.recipes.json_schema import recipe_schema
from paring.recipes.library import Entry, entries, find, read_recipe
from paring.recipes.yaml_loader import read_yaml

LIBRARY = entries()


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_library_is_there() -> None:
    names = [entry.name for entry in LIBRARY]
    assert "smollm2-sparse50-w8a8" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_a_library_recipe(entry: Entry, validator: Any) -> None:
    recipe = Recipe.load(entry.name)
    assert recipe.model
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.evaluate is not None
    assert entry.summary.endswith(".")
    assert len(entry.summary) <= 100
    assert f"  recipe apply {entry.name} --output out/{entry.name}" in entry.header
    written = read_yaml(entry.path.read_text(), "x").data
    validator.validate(written)
    validator.validate(yaml.safe_load(recipe.to_yaml()))


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_the_zoo_has_the_text_that_a_library_recipe_asks_for(entry: Entry) -> None:
    """SmolLM2's tokenizer, which is not here, makes a token of 4.15 characters of it; a pico model's makes more."""
    characters = sum(map(len, zoo.texts("zoo:python-docs", split="train")))
    for stage in Recipe.load(entry.name).stages:
        if stage.data is None or stage.data.samples is None:
            continue
        parts = stage.data.mixture or [stage.data]
        total = sum(getattr(part, "weight", 1) for part in parts)
        for part in parts:
            if part.dataset == "zoo:python-docs":
                share = getattr(part, "weight", 1) / total
                assert stage.data.samples * share * stage.data.length * 4.4 <= characters


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_editors_read_the_library_too(entry: Entry) -> None:
    """Library recipes keep to plain YAML: no bare `${...}` inside `{}`."""
    assert yaml.compose(entry.path.read_text()) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 2"),
        ("version: 1", "verison: 1"),
        ("run: oneshot", "run: oneshto"),
        ("run: oneshot", "runs: oneshot"),
        ("samples: 64", "smaples: 64"),
        ("samples: 64", "samples: 0"),
        ("samples: 64", "samples: many"),
        ("ADMMPruning:", "ADMMPrunnig:"),
        ("sparsity: ${sparsity}", "sparsty: ${sparsity}"),
        ("sparsity: ${sparsity}", "sparsity: 1.5"),
        ("scheme: W8A8", "scheme: W8A9"),
        ("head: int8", "head: int4"),
    ],
)
def test_the_json_schema_refuses_mistakes(old: str, new: str, validator: Any) -> None:
    text = find("smollm2-sparse50-w8a8").path.read_text()
    assert old in text
    assert not validator.is_valid(read_yaml(text.replace(old, new), "x").data)


def test_the_json_schema_knows_every_modifier_and_expressions(validator: Any) -> None:
    def recipe(modifier: Any) -> Any:
        return {"stages": [{"run": "oneshot", "modifiers": [modifier]}]}

    assert validator.is_valid(recipe({"MagnitudePruningModifier": {"sparsity": "${a / 2}"}}))
    assert validator.is_valid(recipe({"ConstantPruning": None}))
    assert not validator.is_valid(recipe({"MagnitudePruning": {"sparsity": "half"}}))
    assert not validator.is_valid(recipe({"ConstantPruning": {}, "SparseGPT": {}}))
    assert not validator.is_valid(recipe({}))


def test_a_wrong_name_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'smollm2-sparse50-w8a8'\?"):
        Recipe.load("smollm2-sparse50-w8a")
    with pytest.raises(RecipeError, match="recipe list"):
        Recipe.load("qqqq")


def test_unreadable_files_are_told(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match="can't be read: is a directory"):
        read_recipe(tmp_path)
    file = tmp_path / "r.yaml"
    file.write_bytes(b"version: \xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(file)
    file.write_bytes("\ufeffversion: 1".encode())
    assert read_recipe(file)[0] == "version: 1"
