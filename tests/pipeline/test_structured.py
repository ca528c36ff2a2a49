"""A model that became smaller, through `recipe apply`: checkpoint, graph, engine, report, and a killed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from paring.engine import Engine
from paring.modifiers import registry
from paring.pipeline import apply
from paring.pipeline.report import summary_table
from paring.recipes import Recipe

RECIPE = """\
version: 1
model: {model}
stages:
  - name: shrink
    run: oneshot
    data: {{dataset: {corpus}/train.txt, samples: 8, length: 32}}
    modifiers:
      - LLMPruner: {{sparsity: 0.5, head_group: {group}, multiple_of: 16}}
  - name: pare
    run: oneshot
    modifiers:
      - SparseGPT: {{sparsity: 0.5, ignore: [lm_head]}}
      - Quantization: {{scheme: W8A8, ignore: [lm_head]}}
evaluate: {{dataset: {corpus}/test.txt, length: 32, windows: 4}}
"""


def recipe(pico: Path, corpus: Path, group: str = "kv") -> Recipe:
    return Recipe.parse(RECIPE.format(model=pico, corpus=corpus, group=group))


@pytest.mark.parametrize(("group", "heads"), [("kv", (2, 1)), ("query", (2, 2))])
def test_a_smaller_model_runs_everywhere(
    pico: Path,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    group: str,
    heads: tuple[int, int],
) -> None:
    capfd.readouterr()
    result = apply(recipe(pico, corpus, group), output=tmp_path, evaluate=False, verify=True)
    assert capfd.readouterr() == ("", "")  # no bars of the libraries, while verifying neither
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == heads
    assert (config["head_dim"], config["intermediate_size"]) == (16, 64)
    tokens = torch.arange(30)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert result.pared is not None
    with torch.inference_mode():
        expected = result.pared.model(tokens[None]).logits[0]
        torch.testing.assert_close(stored(tokens[None]).logits[0], expected, rtol=1e-3, atol=1e-3)
    engine = Engine.load(tmp_path)
    found = torch.from_numpy(engine.logits(tokens.tolist()))
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert engine.generate([1, 2, 3], max_tokens=8).tokens


def test_a_run_killed_after_the_model_became_smaller_goes_on(
    pico: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry()["SparseGPT"], "on_block", die)
        with pytest.raises(KeyboardInterrupt):
            apply(recipe(pico, corpus), output=tmp_path / "resumed", evaluate=False)
    apply(recipe(pico, corpus), output=tmp_path / "resumed", evaluate=False)
    whole = apply(recipe(pico, corpus), output=tmp_path / "whole")
    for name in ("model.safetensors", "config.json", "pruning_masks.npz"):
        stored = (tmp_path / "resumed" / name).read_bytes()
        assert stored == (tmp_path / "whole" / name).read_bytes(), name

    report = whole.report
    before, after = report["before"]["parameters"], report["after"]["parameters"]
    assert whole.pared is not None
    assert after == sum(p.numel() for p in whole.pared.model.parameters()) < before
    assert report["stages"][0]["modifiers"]["LLMPruner"]["parameters"]["after"] == after
    cells = zip(*(column.cells for column in summary_table(report).columns), strict=True)
    rows = {row[0]: row[1:] for row in cells}
    assert rows["parameters"][2] == f"{1 - after / before:.1%} removed"
    assert {"size", "perplexity", "tokens/s"} <= rows.keys()
