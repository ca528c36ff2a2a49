"""docs/custom-modifiers.md: its files run as they are printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from paring.errors import ModelError
from paring.modifiers import Session, load_modifiers, mask_structure
from paring.modifiers.base import ModifierError
from paring.modifiers.hessian import Gram
from paring.modifiers.mask_structure import MaskStructure
from paring.recipes import Recipe

PAGE = Path(__file__).parents[2] / "docs/custom-modifiers.md"
FILES = dict(re.findall(r"```python (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))
RECIPES = re.findall(r"```yaml\n(modifiers:\n.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def files(own_registry, monkeypatch, tmp_path):
    monkeypatch.setattr(mask_structure, "_registry", dict(mask_structure._registry))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(files: Path, modifiers: str, model: torch.nn.Module, calibration: torch.Tensor) -> Session:
    text = "version: 1\nstages:\n  - run: oneshot\n    " + modifiers.replace("\n", "\n    ")
    recipe = Recipe.parse(text, use=[files / name for name in FILES])
    session = Session(model, recipe.stages[0].modifiers)
    session.run_oneshot(calibration)
    return session


def test_the_page_has_a_scorer_and_a_pattern_of_at_most_40_lines():
    assert list(FILES) == ["my_scorer.py", "my_pattern.py"]
    assert len(RECIPES) == 2
    assert all(len(text.splitlines()) <= 40 for text in FILES.values())


def test_the_scorer_of_the_page(files, pico, calibration):
    session = run(files, RECIPES[0], pico(), calibration)
    assert len(session.masks) == 14
    for _, mask in session.masks.items():
        assert (mask.reshape(-1, 16).sum(dim=1) == 8).all()
    (kind,) = load_modifiers(files / "my_scorer.py")
    torch.manual_seed(0)
    x, weight = torch.randn(50, 12), torch.randn(5, 12)
    gram = Gram()
    gram.add(x)
    scorer = kind(sparsity=0.5)
    layer = scorer.layer("q_proj", weight, torch.ones_like(weight, dtype=torch.bool))
    ((after, mask),) = scorer.prune(gram, [layer], {})
    scores = {}
    for i in range(5):
        for j in range(12):
            w = abs(float(weight[i, j]))
            relative = w / float(weight[i].abs().sum()) + w / float(weight[:, j].abs().sum())
            scores[i, j] = relative * float(x[:, j].norm()) ** 0.5
    best = set(sorted(scores, key=lambda at: -scores[at])[:30])
    assert {tuple(at) for at in mask.nonzero().tolist()} == best
    assert torch.equal(after[mask], weight[mask])


def test_the_pattern_of_the_page(files, pico, calibration):
    session = run(files, RECIPES[1], pico(), calibration)
    assert len(session.masks) == 14
    for _, mask in session.masks.items():
        assert (mask.reshape(-1, 4, mask.shape[1]).sum(dim=1) == 2).all()
    scores = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    mask = MaskStructure.parse("2:4-outputs").mask(scores, 0.5)
    for group in range(2):
        for column in range(3):
            part = scores[4 * group : 4 * group + 4, column]
            kept = mask[4 * group : 4 * group + 4, column]
            assert set(kept.nonzero().flatten().tolist()) == set(part.topk(2).indices.tolist())


def test_a_custom_pattern_tells_who_does_not_fit(files, pico, calibration):
    load_modifiers(files / "my_pattern.py")
    with pytest.raises(ModelError, match=r"q_proj is 32 x 32, which 3:5-outputs does not divide"):
        run(files, RECIPES[1].replace("2:4", "3:5"), pico(), calibration)


def test_a_file_may_define_patterns_alone_but_not_nothing(files, tmp_path):
    assert load_modifiers(files / "my_pattern.py") == []
    (tmp_path / "nothing.py").write_text("x = 1\n")
    with pytest.raises(ModifierError, match="no subclass of paring.Modifier or MaskStructure"):
        load_modifiers(tmp_path / "nothing.py")
