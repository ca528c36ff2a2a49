from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from paring.errors import DataError
from paring.pipeline.data import (
    NO_LOSS,
    calibration_tokens,
    collate,
    evaluation_tokens,
    training_examples,
)
from paring.recipes import DataConfig

SUMS = {"prompt": "{question} makes", "answer": " {answer}"}


def data(file: Path | str, length: int = 16, **fields: object) -> DataConfig:
    return DataConfig(dataset=str(file), length=length, **fields)  # type: ignore[arg-type]


def test_calibration_is_the_same_every_time_and_differs_by_seed(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = calibration_tokens(data(corpus / "train.txt", samples=8), tokenizer)
    again = calibration_tokens(data(corpus / "train.txt", samples=8), tokenizer)
    other = calibration_tokens(data(corpus / "train.txt", samples=8, seed=1), tokenizer)
    assert first.shape == (8, 16)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_calibration_windows_are_cut_from_the_text_and_do_not_overlap(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = calibration_tokens(data(corpus / "train.txt"), tokenizer)
    text = (corpus / "train.txt").read_text()
    stream = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = [tuple(stream[i : i + 16]) for i in range(0, len(stream) - 15, 16)]
    assert sorted(map(tuple, windows.tolist())) == sorted(cut)


def test_the_loss_is_on_the_answer_and_the_end_only(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = training_examples(data(corpus / "sums.jsonl", length=64, **SUMS), tokenizer)
    assert len(examples) == 40
    third = examples[3]
    assert tokenizer.decode(third.input_ids) == "3 and 4? makes 7<|end|>"
    learned = [token for token in third.labels if token != NO_LOSS]
    assert tokenizer.decode(learned) == " 7<|end|>"
    assert third.input_ids[-len(learned) :] == learned


def test_a_window_that_holds_no_answer_is_left_out(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = data(corpus / "sums.jsonl", length=4, **SUMS)
    with pytest.raises(DataError, match="only 0; lower `samples` or `length`"):
        training_examples(config, tokenizer)


def test_plain_text_is_packed(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = training_examples(data(corpus / "train.txt", samples=5), tokenizer)
    assert len(examples) == 5
    assert all(len(e.input_ids) == 16 and e.labels == e.input_ids for e in examples.examples)


def test_a_batch_is_padded_without_loss(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = training_examples(data(corpus / "sums.jsonl", length=64, **SUMS), tokenizer)
    pair = [examples[2], examples[11]]
    short, long = sorted(len(e.input_ids) for e in pair)
    batch = collate(pair, pad=9)
    assert short < long
    assert batch["input_ids"].shape == (2, long)
    assert batch["input_ids"][0, short:].tolist() == [9] * (long - short)
    assert batch["labels"][0, short:].tolist() == [NO_LOSS] * (long - short)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]


def test_evaluation_text_is_tokenized_once_and_whole(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = evaluation_tokens(data(corpus / "test.txt"), tokenizer)
    assert tokenizer.decode(tokens) == (corpus / "test.txt").read_text()


def test_a_folder_holds_splits_and_parquet_reads_like_jsonl(
    corpus: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"body": ["the old oak"] * 9, "id": list(range(9))})
    parquet.write_table(table, tmp_path / "dev.parquet")
    (tmp_path / "train.jsonl").write_text('{"body": "the old oak", "id": 0}\n' * 9)
    dev = calibration_tokens(data(tmp_path, length=4, split="dev"), tokenizer)
    train = calibration_tokens(data(tmp_path, length=4), tokenizer)
    assert torch.equal(dev, train)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("train.txt", {"samples": 9999}, "asks for 9999 samples of 16 tokens, but there are only"),
        ("train.txt", {"split": "dev"}, "a single file has no split 'dev'"),
        ("none.txt", {}, "no such file"),
        ("sums.jsonl", {}, "which column is the text\\? It has 'question', 'answer'"),
        ("sums.jsonl", {"text": "anser"}, "no column 'anser'.*did you mean 'answer'"),
        ("sums.jsonl", {"prompt": "{quest}"}, "no column 'quest'"),
        ("sums.jsonl", {"prompt": "{question.real}"}, "not a column name"),
        ("", {"split": "dev"}, "no dev.txt"),
        ("what is/this/", {}, "not a data set"),
    ],
)
def test_what_is_wrong_with_data_is_told(
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    file: str,
    fields: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        calibration_tokens(data(corpus / file, **fields), tokenizer)


def test_a_broken_line_is_told_with_its_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="bad.jsonl:2: not JSON"):
        calibration_tokens(data(tmp_path / "bad.jsonl"), tokenizer)
