"""From text to tokens: calibration windows, training sequences, and the text that perplexity is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError
from .examples import NO_LOSS, Example, Examples, ExampleStream, mix, mix_streams, pack
from .sources import rows, stream_rows
from .templates import Marked, Row, marked_texts, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..recipes import DataConfig, MixturePart, RowsConfig, Stage

BATCH = 64  # documents tokenized at once


def calibration_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Windows for a one-shot pass, int64 [samples, length], the same for the same config and tokenizer.

    Documents are shuffled, tokenized without special tokens until there are enough, joined with the end-of-text
    token and cut into windows that do not overlap, of which `samples` are drawn (all, when None). Each part of a
    mixture gives its share of them. Raises DataError when the text holds fewer, or none.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if config.mixture:
        found = [_calibration(*part, tokenizer, generator) for part in _shares(config)]
        windows = torch.cat(found)
        return windows[torch.randperm(len(windows), generator=generator)]
    return _calibration(config, config, tokenizer, generator)


def _calibration(
    part: RowsConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
) -> torch.Tensor:
    documents = list(texts(part, rows(part), tokenizer))
    order = torch.randperm(len(documents), generator=generator).tolist()
    enough = None if config.samples is None else config.samples * config.length
    stream: list[int] = []
    for tokens in _tokenized((documents[i] for i in order), tokenizer):
        stream += tokens
        if enough is not None and len(stream) >= enough:
            break
    count = len(stream) // config.length
    _check_size(config, count, part)
    windows = torch.tensor(stream[: count * config.length]).view(count, config.length)
    return windows[torch.randperm(count, generator=generator)[: config.samples]]


def _shares(config: DataConfig) -> Iterator[tuple[MixturePart, DataConfig]]:
    """Each part of a mixture, and the config with its share of the samples."""
    assert config.mixture is not None
    total, before, taken = sum(part.weight for part in config.mixture), 0.0, 0
    if config.samples is None:
        raise DataError(f"{config.source}: a mixture to calibrate on needs `samples`; add it")
    for part in config.mixture:
        before += part.weight
        count = round(config.samples * before / total) - taken
        taken += count
        if count:
            yield part, config.model_copy(update={"samples": count})


def evaluation_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The whole text, documents joined by a blank line, tokenized once without special tokens."""
    whole = "\n\n".join(texts(config, rows(config), tokenizer))
    tokens: list[int] = _encode([whole], tokenizer)[0]
    return tokens


def training_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Examples | ExampleStream:
    """Sequences of at most `length` tokens to train on.

    Of rows with answers (templates or chats) one row is one sequence and only the answers and what ends them carry
    loss; `packing` puts several into one. Other text is joined with the end-of-text token and cut into full windows.
    `samples` keeps the first so many. Raises DataError when nothing (or less than `samples`) is left.
    """
    if config.streaming:
        assert config.samples is not None  # the schema asks for it
        make = partial(_streamed, config, tokenizer)
        return ExampleStream(make, config.samples, config.source)
    parts = [
        list(islice(_examples(part, config, rows(part), tokenizer), config.samples))
        for part in config.parts
    ]
    for part, found in zip(config.parts, parts, strict=True):
        if not found:
            _check_size(config, 0, part)
    examples = parts[0]
    if config.mixture:
        weights = [part.weight for part in config.mixture]
        examples = mix(parts, weights, config.seed, config.stopping_strategy)
    _check_size(config, len(examples))
    return Examples(examples[: config.samples])


def check_data(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> None:
    """DataError, now and not after the stages before it, if a stage's data are not there or too few."""
    config = stage.data
    if config is None:
        return
    if stage.training is None:
        calibration_tokens(config, tokenizer)
    elif config.streaming:  # of a stream its first rows alone
        for part in config.parts:
            next(stream_rows(part))
    else:
        training_examples(config, tokenizer)


def _streamed(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, epoch: int
) -> Iterator[Example]:
    """An epoch's sequences, rows shuffled within a buffer."""
    seed = config.seed + epoch
    parts = [partial(_stream_part, part, config, tokenizer, seed) for part in config.parts]
    if config.mixture is None:
        return parts[0]()
    weights = [part.weight for part in config.mixture]
    return mix_streams(parts, weights, seed, config.stopping_strategy)


def _stream_part(
    part: RowsConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Example]:
    shuffled = _shuffled(stream_rows(part), config.buffer_size, seed)
    return _examples(part, config, shuffled, tokenizer)


def _shuffled(stream: Iterator[Row], size: int, seed: int) -> Iterator[Row]:
    """The rows in another order: each next one is drawn from the `size` that were read and not yet given."""
    generator = torch.Generator().manual_seed(seed)
    buffer = list(islice(stream, size))
    for row in stream:
        place = int(torch.randint(len(buffer), (), generator=generator))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[i] for i in torch.randperm(len(buffer), generator=generator).tolist())


def _examples(
    part: RowsConfig,
    config: DataConfig,
    table: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Example]:
    if not part.has_answers:
        stream: list[int] = []
        for tokens in _tokenized(texts(part, table, tokenizer), tokenizer):
            stream += tokens
            whole = len(stream) // config.length * config.length
            for first in range(0, whole, config.length):
                window = stream[first : first + config.length]
                yield Example(window, window)
            del stream[:whole]
        return
    found = (_example(*row, config.length) for row in _answers(part, table, tokenizer))
    learned = (example for example in found if set(example.labels) != {NO_LOSS})
    yield from pack(learned, config.length) if config.packing else learned


def prompts_with_answers(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompt and answer for the first `samples` rows (all, when None), not cut; the last answer of a chat."""
    found = []
    for ids, learned in islice(_answers(config, rows(config), tokenizer, False), config.samples):
        last = max((i for i, flag in enumerate(learned) if flag), default=-1) + 1
        first = last
        while first and learned[first - 1]:
            first -= 1
        found.append((ids[:first], ids[first:last]))
    _check_size(config, len(found))
    return found


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # verbose=False: a document may be longer than the model's context, it is cut into windows later.
    found = tokenizer(documents, add_special_tokens=False, verbose=False, **options)
    return found if options else found["input_ids"]


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(items)
    while batch := list(islice(stream, BATCH)):
        yield batch


def _tokenized(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokens of each document, ended by the end-of-text token."""
    end = _end(tokenizer)
    for batch in _batches(documents):
        for tokens in _encode(batch, tokenizer):
            yield [*tokens, *end]


def _answers(
    config: RowsConfig,
    table: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    ended: bool = True,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of every row, and which of them are answers; `ended`: with an end-of-text token where there is no end."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{config.dataset}: answers need a fast tokenizer, which knows the "
            "place of each token in the text; this model's has none, use `text:` instead"
        )
    end = _end(tokenizer)
    for batch in _batches(marked_texts(config, table, tokenizer)):
        encoded = _encode([m.text for m in batch], tokenizer, return_offsets_mapping=True)
        for marked, ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            learned = [_inside(marked, *offset) for offset in offsets]
            extra = end if ended and not marked.ended else []
            yield [*ids, *extra], [*learned, *(True for _ in extra)]


def _inside(marked: Marked, start: int, stop: int) -> bool:
    """A token across the border (" 42" after "Answer:") belongs to the answer."""
    return any(stop > first and start < last for first, last in marked.answers)


def _example(ids: list[int], learned: list[bool], length: int) -> Example:
    labels = [token if flag else NO_LOSS for token, flag in zip(ids, learned, strict=True)]
    return Example(ids[:length], labels[:length])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _check_size(config: DataConfig, found: int, part: RowsConfig | None = None) -> None:
    wanted = config.samples or 1
    if found < wanted:
        name = f"{part.dataset} (split {part.split})" if part else config.source
        raise DataError(
            f"{name}: the recipe asks for {wanted} samples of "
            f"{config.length} tokens, but there are only {found}; lower `samples` or `length`, or "
            "name a larger data set"
        )
