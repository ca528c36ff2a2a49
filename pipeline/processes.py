"""Several processes at one recipe, as `torchrun` starts them: all train, the first does everything else and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import ModelError

PATIENCE = timedelta(days=7)  # of those that wait while the first pares a model block by block
LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo, where a process is gone
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Processes:
    """How many there are, and which this is. One alone waits for nobody."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """The processes that `torchrun` started, from its environment variables.

        Raises ModelError where `accelerate` would share out the weights: masks are held in whole matrices.
        """
        for name in SHARDING:
            if os.environ.get(name, "").lower() in ("1", "true"):
                raise ModelError(
                    f"{name} is set: parts of weights on each process can't hold zeros yet; use torchrun, where each"
                    " process has the whole model"
                )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each number over all processes, which must have the same names."""
        if self.count == 1 or not values:
            return dict(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        totals = torch.tensor([*values.values()], dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        return dict(zip(values, (totals / self.count).tolist(), strict=True))

    @contextmanager
    def together(self) -> Iterator[None]:
        """ModelError where another process has ended, instead of what gloo says of its connection."""
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and any(words in str(error) for words in LOST):
                raise ModelError(
                    f"process {self.rank} of {self.count}: another has ended; what it printed says why"
                ) from error
            raise

    def part(self) -> None:
        """The end: all are done."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()
