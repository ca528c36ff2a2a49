"""Training sequences: in memory or streamed, packed, mixed by weight, and put into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import DataError

NO_LOSS = -100  # label that the loss skips (torch's ignore_index)


@dataclass(frozen=True)
class Example:
    """One training sequence; `labels` holds -100 where there is no loss.

    `positions` of a packed one begin anew at each of the sequences in it, which don't see one another. `part` is the
    place of its data set in a mixture, None without one.
    """

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None
    part: int | None = None


class Examples(Dataset[Example]):
    """Training sequences in memory, in the order of their rows (the trainer shuffles)."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class ExampleStream(IterableDataset[Example]):
    """An epoch is the first `samples` sequences that `make(epoch)` gives; a resumed run passes over those it has had.

    Raises DataError when there are fewer.
    """

    def __init__(self, make: Callable[[int], Iterator[Example]], samples: int, source: str) -> None:
        self.make = make
        self.samples = samples
        self.source = source
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls it; each epoch has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Example]:
        count = 0
        for example in islice(self.make(self.epoch), self.samples):
            count += 1
            yield example
        if count < self.samples:
            raise DataError(
                f"{self.source}: an epoch is {self.samples} samples, but the stream has only {count}; lower `samples`"
                " or `length`, or let a mixture repeat its parts with stopping_strategy: all_exhausted"
            )


def pack(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """As many whole examples as fit, in their order, into each sequence of at most `length` tokens."""
    packed: list[Example] = []
    size = 0
    for example in examples:
        if packed and size + len(example.input_ids) > length:
            yield _joined(packed)
            packed, size = [], 0
        packed.append(example)
        size += len(example.input_ids)
    if packed:
        yield _joined(packed)


def _joined(examples: list[Example]) -> Example:
    return Example(
        [token for e in examples for token in e.input_ids],
        # Nothing predicts a sequence's first token.
        [label for e in examples for label in (NO_LOSS, *e.labels[1:])],
        [position for e in examples for position in range(len(e.input_ids))],
    )


def mix(
    parts: Sequence[Sequence[Example]], weights: Sequence[float], seed: int, stopping: str
) -> list[Example]:
    """One list in which each next sequence comes from a part drawn by weight."""
    from datasets import Dataset as Table
    from datasets import interleave_datasets

    places = [
        Table.from_dict({"part": [number] * len(part), "row": list(range(len(part)))})
        for number, part in enumerate(parts)
    ]
    mixed = interleave_datasets(
        places, probabilities=_shares(weights), seed=seed, stopping_strategy=stopping
    )
    columns = (mixed[name][:] for name in ("part", "row"))
    return [replace(parts[part][row], part=part) for part, row in zip(*columns, strict=True)]


def mix_streams(
    parts: Sequence[Callable[[], Iterator[Example]]],
    weights: Sequence[float],
    seed: int,
    stopping: str,
) -> Iterator[Example]:
    """As `mix`, without an end in sight."""
    from datasets import IterableDataset as Stream
    from datasets import interleave_datasets

    streams = [
        Stream.from_generator(_rows_of, gen_kwargs={"make": make, "part": part})
        for part, make in enumerate(parts)
    ]
    mixed = interleave_datasets(
        streams, probabilities=_shares(weights), seed=seed, stopping_strategy=stopping
    )
    for row in mixed:
        yield Example(row["input_ids"], row["labels"], row["positions"], row["part"])


def _rows_of(make: Callable[[], Iterator[Example]], part: int) -> Iterator[dict[str, object]]:
    return (vars(replace(example, part=part)) for example in make())


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def collate(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch, int64 [batch, longest], padded on the right; labels of padding carry no loss.

    With a packed example in it, it has `position_ids` too; padding then is a sequence of its own. Of a mixture it has
    `parts` [batch].
    """
    width = max(len(example.input_ids) for example in examples)

    def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([s + [value] * (width - len(s)) for s in sequences])

    batch = {
        "input_ids": padded([e.input_ids for e in examples], pad),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], NO_LOSS),
    }
    if any(e.positions is not None for e in examples):
        positions = [e.positions or list(range(len(e.input_ids))) for e in examples]
        batch["position_ids"] = torch.tensor([p + list(range(width - len(p))) for p in positions])
    parts = [e.part for e in examples if e.part is not None]
    if parts:
        batch["parts"] = torch.tensor(parts)
    return batch
