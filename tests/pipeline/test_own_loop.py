"""docs/own-loop.md: what is printed there runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from paring.engine import Engine
from paring.pipeline.data import training_examples
from paring.pipeline.examples import collate
from paring.recipes import Recipe

PAGE = (Path(__file__).parents[2] / "docs/own-loop.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", PAGE, re.DOTALL))


def test_the_loop_has_at_most_15_lines() -> None:
    assert len(PARTS["my_loop.py"].splitlines()) <= 15


def test_the_page_runs_as_printed(
    pico: Path,
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PARTS["my-recipe.yaml"].replace("zoo:smollm2-135m-instruct", str(pico))
    text = text.replace("zoo:python-docs, length: 256", f"{corpus}/train.txt, length: 16")
    Path("my-recipe.yaml").write_text(text)
    config = Recipe.load("my-recipe.yaml").stages[0].data
    assert config is not None
    examples = training_examples(config, tokenizer)
    assert not isinstance(examples, torch.utils.data.IterableDataset)
    rows = [examples[i] for i in range(24)]
    names: dict[str, Any] = {"batches": [collate(rows[i : i + 4], 1) for i in range(0, 24, 4)]}
    for part in ("imports", "my_loop.py", "save"):
        exec(compile(PARTS[part], part, "exec"), names)
    session, model = names["session"], names["model"]
    assert session.step == session.total_steps == 12
    logs = session.take_logs()
    assert logs["loss/squarehead"] > 0
    for name, mask in session.masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert session.masks.sparsity(name) == pytest.approx(0.5, abs=1e-3)
    engine = Engine.load("out")
    with torch.inference_mode():
        expected = model(torch.arange(12)[None]).logits[0].numpy()
    assert engine.logits(list(range(12))) == pytest.approx(expected, abs=1e-3)
    engine.close()
