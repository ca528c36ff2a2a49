"""report.html, from real runs of a pico model."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from paring.modifiers import registry
from paring.pipeline.apply import ApplyResult, apply
from paring.pipeline.report_figures import split_name
from paring.pipeline.report_html import _scheduled, measures, render
from paring.recipes import DataConfig, Recipe, Stage, TrainingConfig


def stages(corpus: Path) -> list[Stage]:
    kinds = registry()
    text = DataConfig(dataset=str(corpus / "train.txt"), length=16, samples=24)
    return [
        Stage(
            name="prune <first>",
            run="oneshot",
            data=text,
            modifiers=[kinds["SparseGPT"](sparsity=0.3, ignore=["lm_head"])],
        ),
        Stage(
            name="recover",
            run="train",
            data=text,
            training=TrainingConfig(epochs=2.0, batch_size=4, learning_rate=1e-3),
            modifiers=[
                kinds["MagnitudePruning"](
                    init_sparsity=0.3, final_sparsity=0.6, end=1.5, ignore=["lm_head"]
                ),
                kinds["SquareHead"](teacher="self"),
            ],
        ),
    ]


def recipe(pico: Path, corpus: Path, count: int) -> Recipe:
    exam = DataConfig(dataset=str(corpus / "test.txt"), length=32, windows=4)
    return Recipe(model=str(pico), stages=stages(corpus)[:count], evaluate=exam)


@pytest.fixture(scope="module")
def trained(pico: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ApplyResult:
    return apply(recipe(pico, corpus, 2), output=tmp_path_factory.mktemp("report") / "out")


class _Checker(HTMLParser):
    """Tags close in order, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> list[str]:
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert "url(http" not in page
    return checker.seen


def test_the_page_of_a_training_run_has_all_of_it(trained: ApplyResult) -> None:
    assert trained.output is not None
    page = (trained.output / "report.html").read_text()
    seen = check(page)
    # plan, curves, zeros, SparseGPT's error, block errors, ranges
    assert seen.count("svg") == 6
    for text in ("cross entropy", "squarehead", "learning rate", "MagnitudePruning, scheduled"):
        assert f">{text}</text>" in page
    assert "Zeros in each layer" in page
    assert "SparseGPT in prune &lt;first&gt;: error" in page
    assert "prune <first>" not in page
    assert "zeros, from 0.0%" in page
    assert "final_sparsity: 0.6" in page
    said = trained.report["samples"]
    assert len(said) == 3
    assert all(sample["prompt"] and sample["before"] and sample["after"] for sample in said)


def test_the_page_is_made_from_the_report_file_alone(trained: ApplyResult) -> None:
    assert trained.output is not None
    report = json.loads((trained.output / "report.json").read_text())
    page = render(report, Recipe.load(trained.output / "recipe.yaml"))
    assert page == (trained.output / "report.html").read_text()


def test_a_one_shot_run_has_a_page_too(pico: Path, corpus: Path, tmp_path: Path) -> None:
    apply(recipe(pico, corpus, 1), output=tmp_path / "out")
    seen = check((tmp_path / "out" / "report.html").read_text())
    assert seen.count("svg") == 5
    bare = recipe(pico, corpus, 1).model_copy(update={"evaluate": None})
    apply(bare, output=tmp_path / "bare", evaluate=False)
    page = (tmp_path / "bare" / "report.html").read_text()
    assert check(page).count("svg") == 3
    assert "What it says" not in page
    assert "tokens/s" not in page


def test_the_actual_sparsity_is_the_scheduled_one(trained: ApplyResult, corpus: Path) -> None:
    log = trained.report["stages"][1]["log"]
    made = Recipe(stages=stages(corpus))
    ((name, curve),) = _scheduled(
        made, 1, log[-1]["step"] / log[-1]["epoch"], log[-1]["step"]
    ).items()
    assert name == "MagnitudePruning"
    assert curve[-1] == (12, 0.6)
    for entry in log:
        due = [value for step, value in curve if step <= entry["step"]][-1]
        assert entry["sparsity"] == pytest.approx(due, abs=2e-2)  # drawn finer than steps are
    assert log[-1]["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_before_and_after_differ_as_they_must(trained: ApplyResult) -> None:
    found = trained.report["comparison"]
    assert len(found["block_errors"]) == 2
    assert all(0 < error < 2 for error in found["block_errors"])
    assert len(found["input_ranges"]) == 14
    first = found["input_ranges"]["model.layers.0.self_attn.q_proj"]
    same = found["input_ranges"]["model.layers.0.self_attn.k_proj"]
    assert first == same
    assert first[0] > 0


def test_numbers_by_layer_are_found_wherever_a_modifier_puts_them() -> None:
    section = {
        "layers": {"a.0.q": {"sparsity": 0.5, "error": 1, "kind": "x"}, "elsewhere": {"error": 9}},
        "errors": {"a.0.q": 0.25, "a.1.q.weight": 2},
        "skipped": ["a.0.q"],
        "counts": {"W8A8": 3},
    }
    assert measures(section, {"a.0.q", "a.1.q"}) == {
        "sparsity": {"a.0.q": 0.5},
        "error": {"a.0.q": 1.0},
        "errors": {"a.0.q": 0.25, "a.1.q": 2.0},
    }
    assert split_name("model.layers.12.mlp.up_proj") == (12, "mlp.up_proj")
    assert split_name("h.3.attn") == (3, "attn")
    assert split_name("lm_head") is None
