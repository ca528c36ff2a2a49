"""From rows to tokens: calibration windows, training examples, and the text that perplexity is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..errors import DataError
from .sources import prompts_and_answers, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..recipes import DataConfig

NO_LOSS = -100  # label that the loss skips (torch's ignore_index)
BATCH = 64  # documents tokenized at once


def calibration_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Windows for a one-shot pass, int64 [samples, length], the same for the same config and tokenizer.

    Documents are shuffled, tokenized without special tokens until there are enough, joined with the end-of-text
    token and cut into windows that do not overlap, of which `samples` are drawn (all, when None). Raises DataError
    when the text holds fewer, or none.
    """
    generator = torch.Generator().manual_seed(config.seed)
    documents = texts(config)
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = _stream([documents[i] for i in order], tokenizer, config)
    windows = _windows(stream, config)
    return windows[torch.randperm(len(windows), generator=generator)[: config.samples]]


def evaluation_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The whole text, documents joined by a blank line, tokenized once without special tokens."""
    tokens: list[int] = _encode(["\n\n".join(texts(config))], tokenizer)[0]
    return tokens


@dataclass(frozen=True)
class Example:
    """One training sequence; `labels` holds -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


class Examples(Dataset[Example]):
    """Training sequences in memory, in the order of their rows (the trainer shuffles)."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def training_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Sequences of at most `length` tokens to train on.

    With `prompt` and `answer` templates, one row is one sequence and only the answer and the end token carry loss.
    Other text is joined with the end-of-text token and packed into full windows. `samples` keeps the first so many.
    Raises DataError when nothing (or less than `samples`) is left.
    """
    if config.answer is not None:
        end = _end(tokenizer)
        pairs = [(prompt, answer + end) for prompt, answer in _answers(config, tokenizer)]
        found = [_example(prompt, answer, config.length) for prompt, answer in pairs]
        found = [example for example in found if set(example.labels) != {NO_LOSS}]
    else:
        stream = _stream(texts(config), tokenizer, config)
        found = [Example(window, window) for window in _windows(stream, config).tolist()]
    _check_size(config, len(found))
    return Examples(found[: config.samples])


def prompts_with_answers(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompt and answer for the first `samples` rows (all, when None), neither cut nor ended."""
    found = list(islice(_answers(config, tokenizer), config.samples))
    _check_size(config, len(found))
    return found


def collate(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch, int64 [batch, longest], padded on the right; labels of padding carry no loss."""
    width = max(len(example.input_ids) for example in examples)

    def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([s + [value] * (width - len(s)) for s in sequences])

    return {
        "input_ids": padded([e.input_ids for e in examples], pad),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], NO_LOSS),
    }


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # verbose=False: a document may be longer than the model's context, it is cut into windows later.
    found = tokenizer(documents, add_special_tokens=False, verbose=False, **options)
    return found if options else found["input_ids"]


def _stream(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[int]:
    """Tokens of the documents, each ended by the end-of-text token, until there are enough samples."""
    enough = None if config.samples is None else config.samples * config.length
    end = _end(tokenizer)
    stream: list[int] = []
    for first in range(0, len(documents), BATCH):
        for tokens in _encode(documents[first : first + BATCH], tokenizer):
            stream += [*tokens, *end]
        if enough is not None and len(stream) >= enough:
            break
    return stream


def _windows(stream: list[int], config: DataConfig) -> torch.Tensor:
    count = len(stream) // config.length
    _check_size(config, count)
    whole = torch.tensor(stream[: count * config.length], dtype=torch.int64)
    return whole.view(count, config.length)


def _answers(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of every row's prompt and answer, tokenized together."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{config.dataset}: prompt and answer templates need a fast tokenizer, which knows the "
            "place of each token in the text; this model's has none, use `text:` instead"
        )
    pairs = prompts_and_answers(config)
    for first in range(0, len(pairs), BATCH):
        batch = pairs[first : first + BATCH]
        joined = [prompt + answer for prompt, answer in batch]
        encoded = _encode(joined, tokenizer, return_offsets_mapping=True)
        for (prompt, _), ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # A token across the border (" 42" after "Answer:") belongs to the answer.
            start = sum(stop <= len(prompt) for _, stop in offsets)
            yield ids[:start], ids[start:]


def _example(prompt: list[int], answer: list[int], length: int) -> Example:
    labels = [NO_LOSS] * len(prompt) + answer
    return Example((prompt + answer)[:length], labels[:length])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _check_size(config: DataConfig, found: int) -> None:
    wanted = config.samples or 1
    if found < wanted:
        raise DataError(
            f"{config.dataset} (split {config.split}): the recipe asks for {wanted} samples of "
            f"{config.length} tokens, but there are only {found}; lower `samples` or `length`, or "
            "name a larger data set"
        )
