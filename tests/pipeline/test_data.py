from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from paring.errors import DataError
from paring.modifiers.distillation.teacher import model_inputs
from paring.pipeline import load_model
from paring.pipeline.data import (
    calibration_tokens,
    evaluation_tokens,
    prompts_with_answers,
    training_examples,
)
from paring.pipeline.examples import NO_LOSS, Example, ExampleStream, collate
from paring.pipeline.sources import rows, stream_rows
from paring.recipes import DataConfig, MixturePart

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
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


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None


def test_in_a_chat_the_loss_is_on_the_assistants_turns(
    tmp_path: Path, chatty: PreTrainedTokenizerFast
) -> None:
    turns = [("system", "sing"), ("user", "old oak?"), ("assistant", "red bird"), ("user", "and?")]
    turns += [("assistant", "stone wind")]
    chat = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"talk": chat}))
    config = data(tmp_path / "chats.jsonl", length=128, messages="talk")
    (example,) = training_examples(config, chatty).examples
    assert chatty.decode(example.input_ids) == "".join(
        f"<|start|>{role}\n{content}<|end|>\n" for role, content in turns
    )
    learned = [token for token in example.labels if token != NO_LOSS]
    assert chatty.decode(learned) == "red bird<|end|>\nstone wind<|end|>\n"
    ((prompt, answer),) = prompts_with_answers(config, chatty)
    assert chatty.decode(answer) == "stone wind<|end|>\n"
    assert chatty.decode(prompt).endswith("and?<|end|>\n<|start|>assistant\n")


def test_prompt_and_answer_go_into_the_chat_template(
    corpus: Path, chatty: PreTrainedTokenizerFast
) -> None:
    config = data(corpus / "sums.jsonl", length=64, chat=True, **SUMS)
    example = training_examples(config, chatty)[3]
    assert chatty.decode(example.input_ids) == (
        "<|start|>user\n3 and 4? makes<|end|>\n<|start|>assistant\n 7<|end|>\n"
    )
    learned = [token for token in example.labels if token != NO_LOSS]
    assert chatty.decode(learned) == " 7<|end|>\n"


def test_a_chat_without_a_template_or_with_one_that_rewrites_is_an_error(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = data(corpus / "sums.jsonl", length=64, chat=True, **SUMS)
    with pytest.raises(DataError, match="has no chat template"):
        training_examples(config, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    try:
        with pytest.raises(DataError, match="changes earlier turns"):
            training_examples(config, tokenizer)
    finally:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match="no column 'talk'"):
        training_examples(data(corpus / "sums.jsonl", messages="talk"), tokenizer)
    with pytest.raises(DataError, match="a chat is a list of"):
        training_examples(data(corpus / "sums.jsonl", messages="answer"), tokenizer)


def test_packed_answers_are_whole_and_computed_as_if_alone(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, pico: Path
) -> None:
    plain = data(corpus / "sums.jsonl", length=64, **SUMS)
    single = training_examples(plain, tokenizer).examples
    packed = training_examples(plain.model_copy(update={"packing": True}), tokenizer).examples
    assert [t for e in packed for t in e.input_ids] == [t for e in single for t in e.input_ids]
    assert all(len(e.input_ids) <= 64 for e in packed)
    assert len(packed) < len(single) / 2
    model, _ = load_model(pico)
    batch = collate([packed[0], single[2]], pad=1)  # one that is padded, too
    with torch.inference_mode():
        together = model(**model_inputs(batch), use_cache=False).logits
        first = 0
        for example in single[: packed[0].positions.count(0)]:
            ids = torch.tensor([example.input_ids])
            alone = model(ids, use_cache=False).logits[0]
            last = first + len(example.input_ids)
            torch.testing.assert_close(together[0, first:last], alone, rtol=0, atol=1e-4)
            first = last
    assert first == len(packed[0].input_ids)
    torch.testing.assert_close(
        together[1, : len(single[2].input_ids)],
        model(torch.tensor([single[2].input_ids]), use_cache=False).logits[0],
        rtol=0,
        atol=1e-4,
    )


def mixture(corpus: Path, **fields: object) -> DataConfig:
    parts = [
        MixturePart(dataset=str(corpus / "train.txt"), weight=3),
        MixturePart(dataset=str(corpus / "sums.jsonl"), weight=1, **SUMS),
    ]
    return DataConfig(mixture=parts, length=16, **fields)  # type: ignore[arg-type]


def share_of_text(examples: list[Example]) -> float:
    for example in examples:
        assert example.part == (0 if example.labels == example.input_ids else 1)
    return sum(example.part == 0 for example in examples) / len(examples)


def test_a_mixture_draws_by_weight_and_the_same_every_time(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = training_examples(mixture(corpus, samples=80), tokenizer).examples
    again = training_examples(mixture(corpus, samples=80), tokenizer).examples
    other = training_examples(mixture(corpus, samples=80, seed=1), tokenizer).examples
    assert first == again != other
    assert 0.6 < share_of_text(first) < 0.9
    assert mixture(corpus).source == f"75% {corpus}/train.txt + 25% {corpus}/sums.jsonl"
    ended = training_examples(mixture(corpus), tokenizer).examples
    repeated = training_examples(
        mixture(corpus, stopping_strategy="all_exhausted"), tokenizer
    ).examples
    assert len(first) <= len(ended) < len(repeated)
    with pytest.raises(DataError, match="75% .* only"):
        training_examples(mixture(corpus, samples=5000), tokenizer)


def test_calibration_takes_its_share_of_each_part(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = calibration_tokens(mixture(corpus, samples=10), tokenizer)
    assert windows.shape == (10, 16)
    sums = [row for row in windows.tolist() if "?" in tokenizer.decode(row)]
    assert len(sums) == 2  # 2.5 of 10, rounded half to even
    with pytest.raises(DataError, match="needs `samples`"):
        calibration_tokens(mixture(corpus), tokenizer)


def test_a_stream_has_epochs_of_their_own_order_that_come_again(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = data(
        corpus / "sums.jsonl", length=64, streaming=True, samples=40, buffer_size=7, **SUMS
    )
    stream = training_examples(config, tokenizer)
    assert isinstance(stream, ExampleStream)
    assert len(stream) == 40
    first, again = list(stream), list(stream)
    stream.set_epoch(1)
    second = list(stream)
    assert first == again != second
    stored = training_examples(data(corpus / "sums.jsonl", length=64, **SUMS), tokenizer).examples
    assert first != stored

    def tokens(found: list[Example]) -> list[list[int]]:
        return sorted(example.input_ids for example in found)

    assert tokens(first) == tokens(second) == tokens(stored)
    stream.samples = 41
    with pytest.raises(DataError, match="the stream has only 40"):
        list(stream)


def test_a_mixture_streams_too(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = training_examples(mixture(corpus, samples=60, streaming=True), tokenizer)
    found = list(stream)
    assert found == list(stream)
    assert len(found) == 60
    assert 0.55 < share_of_text(found) < 0.95


def test_streams_of_every_kind_of_file_have_the_rows_of_the_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = [{"text": f"row {i}", "id": i} for i in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, table)))
    (tmp_path / "a.txt").write_text("one\nline\n\n\ntwo\n \nthree")
    for name in ("a.parquet", "a.jsonl"):
        assert list(stream_rows(data(tmp_path / name))) == table == rows(data(tmp_path / name))
    paragraphs = [row["text"] for row in stream_rows(data(tmp_path / "a.txt"))]
    assert paragraphs == ["one\nline\n", "two\n", "three"]
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        list(stream_rows(data(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either 'dataset' or 'mixture'"),
        ({"dataset": "a", "mixture": [{"dataset": "b", "weight": 1}]}, "either 'dataset' or"),
        ({"mixture": [{"weight": 1}]}, "needs 'dataset'"),
        ({"mixture": [{"dataset": "b"}]}, "weight"),
        ({"mixture": [{"dataset": "b", "weight": 1}], "prompt": "{q}"}, "belongs to the parts"),
        ({"dataset": "a", "streaming": True}, "'streaming' needs 'samples'"),
        ({"dataset": "a", "packing": True}, "packed anyway"),
        ({"dataset": "a", "chat": True}, "'chat' needs a 'prompt'"),
        ({"dataset": "a", "messages": "m", "prompt": "{q}"}, "exclude each other"),
    ],
)
def test_data_settings_that_contradict_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)
