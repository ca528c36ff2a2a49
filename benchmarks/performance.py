"""Paring beside every installed peer: decoding, prefill, how cost grows, and the memory's bandwidth in the same run.

    python benchmarks/performance.py --model DIR --work DIR --results FILE.jsonl --peers DIR
    python benchmarks/performance.py --model DIR --work DIR --results FILE.jsonl --peers torch=PYTHON llamacpp=PYTHON
    python benchmarks/performance.py ... --parts sparsity context          # how cost grows
    python benchmarks/performance.py --results FILE.jsonl --parts --table FILE.md --picture FILE.png

A peer is a virtual environment in the folder DIR, or NAME=PYTHON, and these are their names and packages from PyPI:
torch (torch, transformers), llamacpp (llama-cpp-python, gguf), openvino (torch, optimum-intel[openvino]), ctranslate2
(ctranslate2, torch, transformers), onnxruntime (onnxruntime, onnx, onnx-ir), deepsparse (deepsparse==1.8.0). Models
beside `--model` are generated in the work folder, and so are the peers' own files, once.

Systems take turns, one process at a time, in an order of its own in every round; a round, at one count of threads,
begins with the bandwidth probe and ends when all had their turn. Virtual machines are moved within minutes, between
cores that share a cache and cores that don't: a run waits until they are as far apart as when the round began. Results
are JSON lines; a case and round that the file has from this CPU, known by its name and its best kernel row, is not run
again, one that failed is tried again at the next start. Ratios are of one round; medians over the rounds are shown.
`--parts` with nothing after it only writes table and picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from performance_cases import OURS, PARTS, Case, Shape
from performance_pictures import draw
from performance_report import page
from tables import put

from paring.engine import _core

PROBE_BYTES = 2**28  # far more than a cache holds
TRIPS = 20_000
TRIES = 3  # runs of a case, for cores that are as far apart as in the round
LIMIT = 3600  # seconds for one process

Row = dict[str, Any]


class Results:
    """The lines of a file, and those added."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.machine = f"{cpu_name()}, {_core.rows()[-1]}"
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def add(self, **row: Any) -> None:
        row |= {"machine": self.machine, "date": datetime.date.today().isoformat()}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def done(self) -> set[tuple[Any, ...]]:
        """`Case.key` of what was measured on this machine."""
        names = ("part", "model", "case", "prompt", "threads", "round")
        return {
            tuple(row[name] for name in names)
            for row in self.rows
            if row["machine"] == self.machine and "decode" in row
        }


def cpu_name() -> str:
    """As the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def interpreters(given: list[str]) -> dict[str, str]:
    """Peer -> its Python: every virtual environment of a folder, and NAME=PYTHON. Paring has this one."""
    found = {OURS: sys.executable}
    for text in given:
        name, equals, python = text.partition("=")
        if equals:
            found[name] = python
        else:
            found |= {path.parts[-3]: str(path) for path in Path(text).glob("*/bin/python")}
    return found


class Runner:
    """Runs the scripts of the peers; a case that failed once is left out from then on."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.peers = interpreters(options.peers)
        self.failed: set[tuple[str, str]] = set()

    def model(self, shape: Shape) -> Path:
        """The Hugging Face folder of a model; a generated one is made by a process of its own."""
        if not shape.sizes:
            return Path(self.options.model)
        folder = Path(self.options.work) / shape.folder / "model"
        if not (folder / "config.json").is_file():
            from memory import make_model

            folder.mkdir(parents=True, exist_ok=True)
            context = multiprocessing.get_context("spawn")
            child = context.Process(
                target=make_model, args=(folder, shape.layers), kwargs=shape.sizes
            )
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{folder}: the model could not be made")
        return folder

    def prepare(self, case: Case) -> None:
        """Let the peer make its own files."""
        self._run(case, ["--prepare"])

    def measure(self, case: Case, threads: int, turn: int, usual: float) -> None:
        """Where a round trip between cores takes as long as `usual`, if the machine comes back to that in time."""
        lengths = [*map(str, case.shape.prefill)]
        settings = ["--threads", threads, "--prompt", case.length, "--tokens", case.shape.tokens]
        if (case.shape.name, case.name) in self.failed:
            return
        for _ in range(TRIES if threads > 1 else 1):
            if threads > 1:
                settle(usual, self.options.patience)
            answer = self._run(
                case, [*map(str, settings), *(["--prefill", *lengths] if lengths else [])]
            )
            exchange = round_trip()
            if answer is None or alike(exchange, usual):
                break
        if answer is not None:
            key = {"part": case.part, "model": case.shape.name, "case": case.name}
            key |= {"prompt": case.length, "threads": threads, "round": turn, "exchange": exchange}
            self.results.add(**key, tokens=case.shape.tokens, **json.loads(answer))

    def _run(self, case: Case, arguments: list[str]) -> str | None:
        """Last line that the script printed; None if it failed, which the results then say."""
        name = (case.shape.name, case.name)
        if name in self.failed:
            return None
        reason, output = self._process(case, arguments)
        if not reason:
            return output.splitlines()[-1] if output.strip() else ""
        self.failed.add(name)
        self.results.add(part=case.part, model=case.shape.name, case=case.name, error=reason)
        return None

    def _process(self, case: Case, arguments: list[str]) -> tuple[str, str]:
        """Why it failed ("": it did not), and what it printed."""
        if case.peer not in self.peers:
            return f"no interpreter for {case.peer} was given", ""
        work = Path(self.options.work) / case.shape.folder
        work.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).parent / "peers" / case.script
        command = [self.peers[case.peer], str(script), "--variant", case.variant]
        command += ["--model", str(self.model(case.shape)), "--work", str(work), *arguments]
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        if case.peer == OURS:
            environment = dict(os.environ)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error), ""
        if done.returncode:
            last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
            return last[0] if last else f"exit code {done.returncode}", ""
        return "", done.stdout


def round_trip() -> float:
    """Nanoseconds that a cache line takes to another core and back; on a virtual machine it changes within minutes."""
    kernels: Any = _core.kernels
    return 1e9 * float(min(kernels.time_exchange(TRIPS))) / TRIPS


def alike(a: float, b: float) -> bool:
    return max(a, b) < 1.7 * min(a, b)


def settle(usual: float, patience: float) -> None:
    """Wait until the cores are as far apart as usual, at most `patience` seconds."""
    until = time.monotonic() + patience
    while not alike(round_trip(), usual) and time.monotonic() < until:
        time.sleep(1)


def probe(results: Results, part: str, model: str, threads: int, turn: int) -> None:
    """Bytes per second of reading memory; the first pass still writes back what filling it left in the caches."""
    kernels: Any = _core.kernels
    seconds = min(kernels.time_reading(PROBE_BYTES, threads, 6)[1:])
    key = {"part": part, "model": model, "threads": threads, "round": turn}
    results.add(**key, bandwidth=PROBE_BYTES / seconds)


def run(options: argparse.Namespace, results: Results) -> None:
    """All that is asked for and not yet in the results."""
    runner = Runner(options, results)
    for part in options.parts:
        wanted = [case for case in PARTS[part] if asked(case, options.cases)]
        done = results.done()
        for shape in dict.fromkeys(case.shape.name for case in wanted):
            cases = [case for case in wanted if case.shape.name == shape]
            turns = [
                (turn, threads)
                for turn in range(options.first_round, options.rounds)
                for threads in options.threads
            ]
            left = {
                turn: [case for case in cases if case.key(turn[1], turn[0]) not in done]
                for turn in turns
            }
            for case in dict.fromkeys(case for some in left.values() for case in some):
                runner.prepare(case)
            for (turn, threads), some in left.items():
                if not some:
                    continue
                probe(results, part, shape, threads, turn)
                usual = round_trip()
                random.Random(turn).shuffle(some)  # speed drifts within a round
                for case in some:
                    runner.measure(case, threads, turn, usual)


def asked(case: Case, texts: list[str] | None) -> bool:
    name = f"{case.shape.name} {case.name}"
    return not texts or any(text in name for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="SmolLM2-135M-Instruct, a Hugging Face folder in float32")
    parser.add_argument("--work", help="folder for models, graphs and the peers' files (30 GB)")
    parser.add_argument("--results", required=True, type=Path, help="JSON lines; added to")
    parser.add_argument("--peers", nargs="*", default=[], help="DIR of environments, NAME=PYTHON")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=["systems"])
    parser.add_argument("--cases", nargs="*", help="those with such a text in 'MODEL CASE'")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="leave out those before")
    parser.add_argument(
        "--patience", type=float, default=240, help="seconds to wait for cores as far apart, a run"
    )
    parser.add_argument("--table", type=Path, help="write the tables into this page")
    parser.add_argument("--picture", type=Path, help="write the roofline here, growth beside it")
    options = parser.parse_args()
    if options.parts and not (options.model and options.work):
        parser.error("--model and --work are needed to measure")
    results = Results(options.results)
    run(options, results)
    rows = [row for row in results.rows if row["machine"] == results.machine]
    if options.picture:
        draw(rows, options.picture)
    if options.table:
        put(options.table, "performance.py", page(rows, options.picture))


if __name__ == "__main__":
    main()
