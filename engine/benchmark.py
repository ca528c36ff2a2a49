"""How fast a graph decodes, alone or against another one in the same run."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..progress import Progress
from .runtime import Engine
from .state import advance_greedily

WARM_UP = 4  # decoded tokens before anything is timed


@dataclass(frozen=True)
class Speed:
    """Of one graph: tokens per second by round, and what it costs to hold it.

    `token_ms` are percentiles of single decode steps, all rounds together. `together` are the
    tokens per second of all sequences of a batch, where one was timed. `resident_bytes` is by
    how much loading the graph made this process grow; `bytes_per_token` the weights that one token
    reads; `file_bytes` the size on disk.
    """

    graph: str
    kernels: str
    decode: list[float]
    prefill: list[float]
    token_ms: dict[str, float]
    load_seconds: float
    resident_bytes: int
    packed_bytes: int
    bytes_per_token: int
    file_bytes: int
    sparsity: float
    together: list[float] = field(default_factory=list)

    @property
    def together_median(self) -> float | None:
        return float(np.median(self.together)) if self.together else None

    @property
    def together_ratio(self) -> float | None:
        """Tokens per second of the batch over those of one sequence: the median over rounds."""
        return _ratio(self.together, self.decode) if self.together else None

    @property
    def decode_median(self) -> float:
        return float(np.median(self.decode))

    @property
    def prefill_median(self) -> float:
        return float(np.median(self.prefill))


@dataclass(frozen=True)
class Benchmark:
    """A finished run. With a `baseline` the two took turns, and ratios are medians of pairs."""

    speed: Speed
    baseline: Speed | None
    prompt: int
    tokens: int
    threads: int
    machine: str
    sequences: int = 1  # decoded together for `Speed.together`, if more than one

    @property
    def decode_ratio(self) -> float | None:
        """Decode speed over the baseline's: the median over rounds of the pair's ratio."""
        return _ratio(self.speed.decode, self.baseline.decode) if self.baseline else None

    @property
    def prefill_ratio(self) -> float | None:
        return _ratio(self.speed.prefill, self.baseline.prefill) if self.baseline else None

    def to_json(self) -> dict[str, Any]:
        """Everything, medians and ratios included, as JSON values."""
        found = asdict(self)
        for name, speed in (("speed", self.speed), ("baseline", self.baseline)):
            if speed is not None:
                found[name]["decode_median"] = speed.decode_median
                found[name]["prefill_median"] = speed.prefill_median
                found[name]["together_median"] = speed.together_median
                found[name]["together_ratio"] = speed.together_ratio
        return {**found, "decode_ratio": self.decode_ratio, "prefill_ratio": self.prefill_ratio}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float(np.median(np.array(ours) / np.array(theirs)))


def benchmark(
    graph: str | Path,
    against: str | Path | None = None,
    *,
    prompt: int = 128,
    tokens: int = 128,
    threads: int | None = None,
    kernels: str = "auto",
    rounds: int = 3,
    sequences: int = 1,
    progress: Progress | None = None,
) -> Benchmark:
    """Time prefill of `prompt` random tokens and greedy decoding of `tokens` more, `rounds` times.

    `against` is another graph, taken in turns with the first; both are loaded all the while. With
    several `sequences`, each round also decodes so many together.
    Raises DataError when the context is too short, GraphError when a graph can't be loaded.
    """
    if min(prompt, tokens, rounds, sequences) < 1:
        raise DataError("benchmark: prompt, tokens, rounds and sequences must be at least 1")
    paths = [Path(path) for path in (graph, against) if path is not None]
    with _loaded(paths, threads, kernels) as runs:
        for run in runs:
            run.check(prompt + max(tokens, WARM_UP))
            run.round(run.prompt(prompt), WARM_UP)
        for turn in range(rounds):
            for run in runs:
                decode, prefill = run.round(run.prompt(prompt), tokens, record=True)
                run.decode.append(decode)
                run.prefill.append(prefill)
                if sequences > 1:
                    run.together.append(run.decode_together(sequences, prompt, tokens))
            if progress is not None:
                note = " against ".join(f"{run.decode[-1]:.1f}" for run in runs)
                progress("benchmark", turn + 1, rounds, f"{note} tokens/s")
        speeds = [run.speed() for run in runs]
        used = int(runs[0].engine.info()["threads"])
    return Benchmark(
        speed=speeds[0],
        baseline=speeds[1] if len(speeds) > 1 else None,
        prompt=prompt,
        tokens=tokens,
        threads=used,
        machine=_machine(),
        sequences=sequences,
    )


@dataclass
class _Run:
    """A loaded graph and the times so far."""

    path: Path
    engine: Engine
    load_seconds: float
    resident_bytes: int
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    def check(self, length: int) -> None:
        if length > self.engine.context:
            raise DataError(
                f"{self.path}: prompt and tokens are {length}, but the model's context is "
                f"{self.engine.context}; ask for fewer"
            )

    def prompt(self, length: int, seed: int = 0) -> NDArray[np.int64]:
        """The same random tokens for every graph with this vocabulary."""
        return np.random.default_rng(seed).integers(0, self.engine.vocabulary, length)

    def round(
        self, prompt: NDArray[np.int64], tokens: int, record: bool = False
    ) -> tuple[float, float]:
        """Tokens per second of decoding and of prefill; `record` keeps the time of every step."""
        state = self.engine.state()
        began = time.perf_counter()
        state.extend(prompt)
        prefilled = time.perf_counter()
        steps = []
        for _ in range(tokens):
            start = time.perf_counter()
            state.append(int(state.logits.argmax()))
            steps.append(time.perf_counter() - start)
        if record:
            self.steps += steps
        return tokens / sum(steps), len(prompt) / (prefilled - began)

    def decode_together(self, sequences: int, prompt: int, tokens: int) -> float:
        """Tokens per second of so many sequences in all, greedy, after a prompt each."""
        states = [self.engine.state() for _ in range(sequences)]
        for seed, state in enumerate(states):
            state.extend(self.prompt(prompt, seed))
        began = time.perf_counter()
        advance_greedily(states, tokens)
        return sequences * tokens / (time.perf_counter() - began)

    def speed(self) -> Speed:
        info = self.engine.info()
        percentiles = np.percentile(np.array(self.steps) * 1000, (50, 90, 99))
        names = ("p50", "p90", "p99")
        return Speed(
            graph=str(self.path),
            kernels=info["kernels"],
            decode=self.decode,
            prefill=self.prefill,
            token_ms=dict(zip(names, map(float, percentiles), strict=True)),
            load_seconds=self.load_seconds,
            resident_bytes=self.resident_bytes,
            packed_bytes=info["memory"]["weights"] + info["memory"]["tables"],
            bytes_per_token=info["bytes_per_token"],
            file_bytes=sum(file.bytes for file in self.engine.graph.files.values()),
            sparsity=info["sparsity"],
            together=self.together,
        )


@contextmanager
def _loaded(paths: list[Path], threads: int | None, kernels: str) -> Iterator[list[_Run]]:
    """All graphs loaded, with the time and memory that each took; closed afterwards."""
    runs: list[_Run] = []
    try:
        for path in paths:
            gc.collect()
            before, began = resident_bytes(), time.perf_counter()
            engine = Engine.load(path, threads=threads, kernels=kernels)
            seconds = time.perf_counter() - began
            runs.append(_Run(path, engine, seconds, max(resident_bytes() - before, 0)))
        yield runs
    finally:
        for run in runs:
            run.engine.close()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else 0


def _machine() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
