"""docs/training.md and docs/quantization.md: their snippets are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paring.recipes import Recipe

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS, ONESHOT = (
    re.findall(r"```yaml\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    for name in ("training.md", "quantization.md")
)
DATA = "data: {dataset: x.txt}\n"
TRAINING = "training: {epochs: 1, batch_size: 1, learning_rate: 1e-4}\n"


def snippets() -> list[str]:
    """Each key of a stage that a block shows, on its own where it shows several of a kind."""
    return [part for block in BLOCKS for part in re.split(r"^(?=\w)", block, flags=re.M) if part]


@pytest.mark.parametrize("snippet", snippets())
def test_a_snippet_is_part_of_a_stage(snippet: str) -> None:
    kind = snippet.split(":", 1)[0]
    rest = "".join(part for part in (DATA, TRAINING) if not part.startswith(kind))
    body = (rest + snippet).replace("\n", "\n    ")
    Recipe.parse(f"version: 1\nstages:\n  - run: train\n    {body}", source="docs/training.md")


def test_there_are_snippets_of_every_kind() -> None:
    kinds = {snippet.split(":", 1)[0] for snippet in snippets()}
    assert kinds == {"modifiers", "data", "training"}
    assert len(snippets()) == 7


@pytest.mark.parametrize("snippet", ONESHOT)
def test_modifiers_in_one_pass_are_a_stage(snippet: str) -> None:
    body = (DATA + snippet).replace("\n", "\n    ")
    Recipe.parse(
        f"version: 1\nstages:\n  - run: oneshot\n    {body}", source="docs/quantization.md"
    )


def test_the_page_has_snippets() -> None:
    assert len(ONESHOT) == 5
