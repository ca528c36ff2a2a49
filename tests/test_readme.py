"""What the README shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path

from paring import Recipe
from paring.modifiers.base import load_modifiers

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The only code block in a language that has the word in it."""
    (found,) = [
        text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in text
    ]
    return str(found)


def test_the_recipe_is_one() -> None:
    recipe = Recipe.parse(block("yaml", "stages:"), source="README.md")
    assert [type(m).__name__ for stage in recipe.stages for m in stage.modifiers] == [
        "ADMMPruning",
        "SmoothQuant",
        "Quantization",
    ]


def test_the_modifier_clips(own_registry: None, tmp_path: Path) -> None:
    import torch

    from paring import Session

    (tmp_path / "my_modifiers.py").write_text(block("python", "class WeightClipping"))
    (kind,) = load_modifiers(tmp_path / "my_modifiers.py")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    session = Session(model, modifiers=[kind(deviations=1.0)])
    before = model[0].weight.std().item()
    kind(deviations=1.0).on_update(session)
    assert model[0].weight.abs().max().item() <= before + 1e-6
