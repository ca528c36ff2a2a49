"""Text that a model writes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from paring import Recipe, apply
from paring.cli import application
from paring.errors import DataError, ModelError, ParingError, RecipeError
from paring.pipeline import load_model
from paring.pipeline.own_text import TOGETHER, is_loop, write_texts

CHAT = "{% for m in messages %}the user: {{ m.content }} . {% endfor %}"


def write(*arguments: object) -> Result:
    done = CliRunner().invoke(application(), ["write", *map(str, arguments)])
    if isinstance(done.exception, ParingError):
        raise done.exception
    return done


def likeliest(model: Any, tokenizer: Any, opening: list[int], length: int) -> str:
    ids = list(opening)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[len(opening) :]))


def test_a_recipe_calibrates_on_what_the_model_wrote(pico: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    done = write(pico, "--output", file, "--texts", 20, "--length", 24)
    assert done.exit_code == 0, done.output
    assert "20 texts, 480 tokens" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 20
    assert len({row["text"] for row in rows}) > 15
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    write(pico, "--output", again, "--texts", 20, "--length", 24)
    write(pico, "--output", other, "--texts", 20, "--length", 24, "--seed", 1)
    assert again.read_bytes() == file.read_bytes() != other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (file, again, other)
    )
    text = f"""
version: 1
model: {pico}
stages:
  - run: oneshot
    data: {{dataset: {file}, samples: 8, length: 16}}
    modifiers: [SparseGPT: {{sparsity: 0.5, ignore: [lm_head]}}]
"""
    result = apply(Recipe.parse(text), output=tmp_path / "out", evaluate=False)
    assert result.report["after"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_cold_it_writes_what_is_likeliest_from_each_opening(pico: Path) -> None:
    model, tokenizer = load_model(pico)
    tokenizer.chat_template = CHAT
    found = write_texts(model, tokenizer, TOGETHER + 1, 12, temperature=1e-4)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert found[0] == found[TOGETHER - 1] == likeliest(model, tokenizer, [first], 12)
    turn = tokenizer("the user: ", add_special_tokens=False)["input_ids"]
    assert found[TOGETHER] == likeliest(model, tokenizer, turn, 12)


def test_loops_are_drawn_anew(pico: Path) -> None:
    assert is_loop("the same words again, " * 20)
    assert not is_loop("the same " * 8)  # too short to tell
    assert not is_loop(Path(__file__).read_text(encoding="utf-8")[:1500])
    model, tokenizer = load_model(pico)
    with pytest.raises(ModelError, match="repeat themselves; give a higher temperature"):
        write_texts(model, tokenizer, 2, 255, temperature=1e-4)
    assert not any(map(is_loop, write_texts(model, tokenizer, 4, 255, temperature=1.5)))


def test_it_draws_as_the_model_says(pico: Path) -> None:
    model, tokenizer = load_model(pico)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        chances = model(torch.tensor([[first]])).logits[0, -1].softmax(-1)
    texts = write_texts(model, tokenizer, 2000, 1, temperature=1.0, top_p=1.0)
    token = int(chances.argmax())
    share = texts.count(tokenizer.decode([token])) / len(texts)
    error = (float(chances[token]) / len(texts)) ** 0.5
    assert share == pytest.approx(float(chances[token]), abs=4 * error)


def test_bad_input_is_told(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"become a .jsonl file"):
        write(pico, "--output", tmp_path / "own.txt")
    with pytest.raises(RecipeError, match="make it first"):
        write(pico, "--output", tmp_path / "nowhere" / "own.jsonl")
    with pytest.raises(ModelError, match="longer than the model's context"):
        write(pico, "--output", tmp_path / "own.jsonl", "--length", 100_000)
    assert list(tmp_path.iterdir()) == []
    model, tokenizer = load_model(pico)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="weights are finite"):
        write_texts(model, tokenizer, 1, 4)
