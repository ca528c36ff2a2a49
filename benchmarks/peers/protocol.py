"""What `performance.py` asks a peer's script, and what it answers.

    PEER_PYTHON benchmarks/peers/NAME_decode.py --model DIR --work DIR --variant V --prepare
    PEER_PYTHON benchmarks/peers/NAME_decode.py --model DIR --work DIR --variant V --threads T

The first makes the peer's own files in the work folder, once. The second measures, batch 1, random prompts, greedy, and
prints one JSON line: {"version", "bytes_per_token", "decode", "prefill": {LENGTH: tokens/s}, "load_seconds",
"resident_bytes", ...}. `decode` is in tokens/s, after a prompt of `--prompt` tokens; `bytes_per_token` is what the
weights that one decoded token reads take; loading is timed after the imports, and by `resident_bytes` the process had
grown when it had decoded. Whatever else a system has in `details`, if any, is added.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

WARM_UP = 4  # decoded tokens before anything is timed


class System(Protocol):
    """A loaded model."""

    version: str
    bytes_per_token: int
    vocabulary: int

    def run(self, prompt: list[int], tokens: int) -> tuple[float | None, float]:
        """Seconds of prefill of a new sequence (None: it has none), and of decoding so many tokens after it."""


class Stepwise:
    """A system that computes a prompt, then a token at a time."""

    def start(self, prompt: list[int]) -> int:
        """The likeliest token after a prompt of a new sequence."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """The likeliest token after one more."""
        raise NotImplementedError

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        token = self.start(prompt)
        prefilled = time.perf_counter()
        for _ in range(tokens):
            token = self.step(token)
        return prefilled - began, time.perf_counter() - prefilled


def measure(system: System, prompt: int, tokens: int, prefill: list[int]) -> dict[str, Any]:
    """Every length twice; the first time warms up."""
    rates = {}
    for length in sorted({*prefill, prompt}):
        ids = random.Random(0).choices(range(system.vocabulary), k=length)
        count = tokens if length == prompt else 0
        system.run(ids, WARM_UP if count else 0)
        filled, decoded = system.run(ids, count)
        if length in prefill and filled is not None:
            rates[str(length)] = length / filled
        if count:
            decode = count / decoded
    return {
        "version": system.version,
        "bytes_per_token": system.bytes_per_token,
        "decode": decode,
        "prefill": rates,
        **getattr(system, "details", {}),
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `folder` when all went well; None if that is there already."""
    if folder.exists():
        yield None
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def main(
    variants: tuple[str, ...] | None,
    prepare: Callable[[argparse.Namespace], None],
    load: Callable[[argparse.Namespace], System],
) -> None:
    """The command line of a peer's script; `variants` None takes any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder")
    parser.add_argument("--work", required=True, type=Path, help="folder for what this makes")
    parser.add_argument("--variant", required=True, choices=variants)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    if options.prepare:
        prepare(options)
        return
    before, began = resident_bytes(), time.perf_counter()
    system = load(options)
    seconds = time.perf_counter() - began
    found = measure(system, options.prompt, options.tokens, options.prefill)
    found |= {"load_seconds": seconds, "resident_bytes": resident_bytes() - before}
    print(json.dumps(found))
