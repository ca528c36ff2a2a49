"""What every mask pattern costs in perplexity, at equal bytes per weight and at equal decode speed.

    python benchmarks/patterns.py --model DIR --data DIR --results FILE.jsonl --speed --work DIR   # on a quiet machine
    python benchmarks/patterns.py --model DIR --data DIR --results FILE.jsonl [--cases 8:16 1x4@0.4 ...]
    python benchmarks/patterns.py --model DIR --data DIR --results FILE.jsonl --table FILE.md --cases

`--speed` times graphs pruned by magnitude to several sparsities, each in turn with dense int8; a round goes over all
of them, and medians over rounds are shown; one that the engine keeps as dense has dense's speed. The graphs, 6 GB,
stay in `--work`. Without it, the model is pruned (ADMMPruning) in each pattern, to each sparsity of `GRID`, and
stored in float, int8 (W8A8) and int4 (GPTQ, W4A8, groups of 64); perplexity is by the protocol of `accuracy.py`, and
bytes per weight are those of the exported graph.

N:M fixes its sparsity, so 8:16 and 4:16 set the levels. A pattern with a free sparsity is given at the one at which
its smallest layout takes as many bytes as the level's (by the engine's cost model, row `KERNELS`), and at the one at
which it decodes as fast (within `ALIKE`), between the speeds measured; its perplexity there lies between its two
neighbours in `GRID`, on a straight line of the logarithm. Where dense weights are as fast, that is said. 2:4 and 4:8
keep their sparsity: there the table says how fast they are beside 8:16. Results are JSON lines; what is in the file is
not run again. `--cases` with nothing after it only writes the table.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accuracy import SAMPLES, WINDOWS, perplexity, report, windows
from pattern_graphs import bytes_per_weight, dense_graph, is_dense, speed, write_pruned
from tables import put
from transformers import AutoModelForCausalLM, AutoTokenizer

from paring import Recipe, Session
from paring.engine.cost import DType, cost
from paring.engine.export import export
from paring.modifiers import MaskStructure
from paring.modifiers.quantization.layer import detach
from paring.pipeline.checkpoint import write_checkpoint

GRID: dict[str, tuple[float, ...]] = {  # where it is empty, the pattern fixes the sparsity
    "unstructured": (0.5, 0.75, 0.8),
    "2x1": (0.36, 0.45, 0.62, 0.69),
    "1x4": (0.3, 0.41, 0.56, 0.66),
    "n:16": (0.5, 0.75, 0.8),
    "2:4": (),
    "4:8": (),
    "8:16": (),
    "4:16": (),
}
LEVELS = ("8:16", "4:16")
DTYPES: dict[str, DType] = {"int8": "i8", "int4": "i4"}
FLOAT = "float"
QUANTIZATION: dict[str, dict[str, Any]] = {
    "int8": {"Quantization": {"scheme": "W8A8", "ignore": ["lm_head"]}},
    "int4": {"GPTQ": {"scheme": "W4A8", "group_size": 64, "ignore": ["lm_head"]}},
}
KERNELS = "avx512_vbmi2"  # has a layout of its own for every pattern
MEASURED = (0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities that `--speed` times
ALIKE = 0.98  # of a speed is taken for the same speed: as near as medians of a shared machine come

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One pruning, and what it will be stored in."""

    pattern: str
    sparsity: float

    @property
    def name(self) -> str:
        fixed = MaskStructure.parse(self.pattern).sparsity is not None
        return self.pattern if fixed else f"{self.pattern}@{self.sparsity:g}"

    @property
    def modifier(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"mask_structure": self.pattern, "ignore": ["lm_head"]}
        if MaskStructure.parse(self.pattern).sparsity is None:
            fields["sparsity"] = self.sparsity
        return {"ADMMPruning": fields}


def grid() -> Iterator[Case]:
    for pattern, sparsities in GRID.items():
        for sparsity in sparsities or (MaskStructure.parse(pattern).sparsity,):
            assert sparsity is not None
            yield Case(pattern, sparsity)


def read_bytes(pattern: str, sparsity: float, dtype: str) -> float:
    """Bytes of a weight without scales in the engine's smallest layout."""
    blocks = 1 - sparsity if pattern == "1x4" else 1 - sparsity**4
    return cost(DTYPES[dtype], 1 - sparsity, blocks, KERNELS, pattern, by="bytes").bytes


def at_bytes(pattern: str, level: str, dtype: str) -> float:
    """The sparsity at which a pattern takes as many bytes as the level does."""
    fixed = MaskStructure.parse(level).sparsity
    assert fixed is not None
    wanted = read_bytes(level, fixed, dtype)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if read_bytes(pattern, middle, dtype) > wanted else (low, middle)
    return high


def at_speed(pattern: str, level: str, dtype: str, speeds: Rows) -> float | None:
    """The least sparsity at which a pattern is as fast as the level, between two measured; 0: dense.

    inf: not at any that was measured; None: unknown.
    """
    level_speed = speed_of(level, dtype, speeds)
    points = {
        float(row["sparsity"]): float(row["of_dense_int8"])
        for row in speeds
        if row["dtype"] == dtype and (row["pattern"] == pattern or row["sparsity"] == 0)
    }
    if level_speed is None or not points:
        return None
    wanted = level_speed * ALIKE
    if points.get(0.0, 0.0) >= wanted:
        return 0.0
    for (low, slow), (high, fast) in itertools.pairwise(sorted(points.items())):
        if slow < wanted <= fast:
            return low + (high - low) * (wanted - slow) / (fast - slow)
    return math.inf


def speed_of(pattern: str, dtype: str, speeds: Rows) -> float | None:
    """Of a pattern that fixes its sparsity, times dense int8; None: unknown."""
    found = (row for row in speeds if (row["pattern"], row["dtype"]) == (pattern, dtype))
    return next((float(row["of_dense_int8"]) for row in found), None)


def between(points: dict[float, float], at: float) -> float | None:
    """Linear interpolation of y over x; None outside of the points."""
    if at in points:
        return points[at]
    for (a, low), (b, high) in itertools.pairwise(sorted(points.items())):
        if a <= at <= b:
            return low + (high - low) * (at - a) / (b - a)
    return None


def perplexity_at(pattern: str, sparsity: float, dtype: str, rows: Rows) -> float | None:
    """Between the pattern's neighbouring sparsities in the results; None outside of them."""
    points = {
        float(row["sparsity"]): math.log(row["perplexity"])
        for row in rows
        if (row["pattern"], row["dtype"]) == (pattern, dtype)
    }
    found = between(points, sparsity)
    return None if found is None else math.exp(found)


class Accuracy:
    """Prunes, quantizes, measures."""

    def __init__(self, model: str, data: Path, samples: int, count: int) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        text = data / "wikitext-2"
        self.calibration = windows(self.tokenizer, text / "calibration.txt", samples)
        self.evaluation = windows(self.tokenizer, text / "dev.txt", count)

    def run(self, case: Case, dtypes: list[str]) -> Iterator[dict[str, Any]]:
        """A row for each dtype: `float` as pruned, or quantized after it."""
        network = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        began = time.perf_counter()
        pruning = self._stage(network, case.modifier, None)
        seconds = time.perf_counter() - began
        pruned = copy.deepcopy(network.state_dict())
        zeros = [pruning.masks.sparsity(name) for name in pruning.masks]
        common = {
            "case": case.name,
            "pattern": case.pattern,
            "sparsity": case.sparsity,
            "zeros": sum(zeros) / len(zeros),
            "prune_seconds": seconds,
        }
        for dtype in dtypes:
            network.load_state_dict(pruned)
            if dtype == FLOAT:
                yield {**common, "dtype": dtype, "perplexity": self._perplexity(network)}
                continue
            session = self._stage(network, QUANTIZATION[dtype], pruning.masks)
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(
                    Path(folder), network, self.tokenizer, session.quantization, session.masks
                )
                size = bytes_per_weight(export(folder, head="int8"))
            yield {**common, "dtype": dtype, "perplexity": self._perplexity(network), **size}
            for layer in session.quantization.values():
                detach(layer)

    def _perplexity(self, network: Any) -> float:
        return perplexity(network, self.evaluation)

    def _stage(self, network: Any, modifier: dict[str, Any], masks: Any) -> Session:
        text = yaml.safe_dump(
            {"version": 1, "stages": [{"run": "oneshot", "modifiers": [modifier]}]}
        )
        stage = Recipe.parse(text).stages[0]
        session = Session(network, stage.modifiers, tokenizer=self.tokenizer, masks=masks)
        session.run_oneshot(self.calibration, report, None)
        return session


def time_patterns(options: argparse.Namespace, done: Rows, keep: Any) -> None:
    """Rounds over every pattern at the sparsities of MEASURED (or its own), each against dense int8."""
    have = {(row["pattern"], row["sparsity"], row["dtype"], row["round"]) for row in done}
    cases = [("unstructured", 0.0)]
    for pattern in GRID:
        fixed = MaskStructure.parse(pattern).sparsity
        cases += [(pattern, sparsity) for sparsity in (MEASURED if fixed is None else (fixed,))]
    graphs = {}
    dense, base = None, graph_folder(options.work, "unstructured", 0.0, "int8")
    for (pattern, sparsity), dtype in itertools.product(cases, DTYPES):
        graph = graph_folder(options.work, pattern, sparsity, dtype)
        graphs[pattern, sparsity, dtype] = graph
        if not (graph / "graph.json").exists():
            dense = dense or dense_graph(options.model, options.work / "float")
            write_pruned(dense, pattern, sparsity, dtype, graph)
    alike = {graph for graph in graphs.values() if is_dense(graph)}
    for turn in range(options.rounds):
        for (pattern, sparsity, dtype), graph in graphs.items():
            row = {"pattern": pattern, "sparsity": sparsity, "dtype": dtype}
            if sparsity > 0 and graph in alike:
                if turn == 0 and (pattern, sparsity, dtype, None) not in have:
                    keep({**row, "round": None})
            elif (pattern, sparsity, dtype, turn) not in have:
                keep({**row, "round": turn, **speed(graph, base, options.threads, rounds=1)})


def graph_folder(work: Path, pattern: str, sparsity: float, dtype: str) -> Path:
    return Path(work, f"{pattern.replace(':', 'of')}-{sparsity:g}-{dtype}")


def medians(speeds: Rows) -> Rows:
    """One row for every graph, with the median over its rounds; one kept as dense (round None) has dense's."""
    rounds: dict[tuple[str, float, str], list[float]] = {}
    for row in speeds:
        key = (row["pattern"], row["sparsity"], row["dtype"])
        rounds.setdefault(key, []).extend([] if row["round"] is None else [row["of_dense_int8"]])
    return [
        {
            "pattern": pattern,
            "sparsity": sparsity,
            "dtype": dtype,
            "of_dense_int8": statistics.median(found or rounds["unstructured", 0.0, dtype]),
            "dense": not found,
        }
        for (pattern, sparsity, dtype), found in rounds.items()
    ]


def table(rows: Rows, speeds: Rows) -> str:
    """Perplexities at equal bytes and equal speed, all that was measured, and the speeds."""
    lines = []
    for kind in ("bytes per weight", "decode speed"):
        lines += [
            f"### At equal {kind}",
            "",
            f"| as 8:16 or 4:16 | stored in | {' | '.join(GRID)} |",
            "|---" * (len(GRID) + 2) + "|",
        ]
        for level, dtype in itertools.product(LEVELS, DTYPES):
            cells = [cell(pattern, level, dtype, kind, rows, speeds) for pattern in GRID]
            lines.append(f"| {level} | {dtype} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "### As measured",
        "",
        "| pattern | sparsity | float | int8 | int4 | bytes per weight in the graph, int8 / int4 |",
        "|---|---|---|---|---|---|",
    ]
    cases = {(list(GRID).index(row["pattern"]), row["sparsity"], row["case"]) for row in rows}
    for _, sparsity, case in sorted(cases):
        found = {row["dtype"]: row for row in rows if row["case"] == case}
        pattern = next(row["pattern"] for row in found.values())
        values = [f"{found[d]['perplexity']:.2f}" if d in found else "" for d in (FLOAT, *DTYPES)]
        sizes = [f"{found[d]['file_bytes']:.3f}" if d in found else "" for d in DTYPES]
        lines.append(f"| {pattern} | {sparsity:.0%} | {' | '.join(values)} | {' / '.join(sizes)} |")
    lines += [
        "",
        "### Decode speed, times dense int8",
        "",
        "| stored in | pattern | sparsity | speed |",
        "|---|---|---|---|",
    ]
    for row in speeds:
        speed_text = "as dense" if row["dense"] else f"{row['of_dense_int8']:.2f}"
        lines.append(
            f"| {row['dtype']} | {row['pattern']} | {row['sparsity']:.0%} | {speed_text} |"
        )
    return "\n".join(lines) + "\n"


def cell(pattern: str, level: str, dtype: str, kind: str, rows: Rows, speeds: Rows) -> str:
    """`perplexity (sparsity)` of a pattern at a level; beside `GRID` on which side; else nothing."""
    sparsity = MaskStructure.parse(pattern).sparsity
    note = ""
    if sparsity is not None:
        if sparsity != MaskStructure.parse(level).sparsity:
            return ""
        if kind == "decode speed" and pattern != level:
            ours, theirs = speed_of(pattern, dtype, speeds), speed_of(level, dtype, speeds)
            if ours is None or theirs is None:
                return ""
            note = f", {ours / theirs:.2f} x as fast"
    elif kind == "decode speed":
        sparsity = at_speed(pattern, level, dtype, speeds)
        if sparsity == 0:
            return "dense is as fast"
        if sparsity == math.inf:
            return f"slower at {max(MEASURED):.0%}"
    else:
        sparsity = round(at_bytes(pattern, level, dtype), 6)
    if sparsity is None:
        return ""
    value = perplexity_at(pattern, sparsity, dtype, rows)
    if value is not None:
        return f"{value:.2f} ({sparsity:.0%}{note})"
    known = [row for row in rows if (row["pattern"], row["dtype"]) == (pattern, dtype)]
    if not known:
        return ""
    nearest = min(known, key=lambda row: abs(float(row["sparsity"]) - sparsity))
    side = "below" if sparsity < nearest["sparsity"] else "above"
    return f"{side} {nearest['perplexity']:.2f} ({sparsity:.0%})"


def read(file: Path, kind: Literal["speed", "accuracy"]) -> Rows:
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="the folder with wikitext-2/")
    parser.add_argument("--results", required=True, type=Path, help="JSON lines; added to")
    parser.add_argument("--speed", action="store_true", help="time graphs; wants a quiet machine")
    parser.add_argument("--work", type=Path, help="the graphs that --speed times are kept here")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--cases", nargs="*", help="patterns, or pattern@sparsity; not given: all")
    parser.add_argument("--table", type=Path, help="write the tables into this page")
    options = parser.parse_args()
    if options.speed and options.work is None:
        parser.error("--speed needs --work DIR")

    def keep(kind: str, row: dict[str, Any]) -> None:
        row = {"kind": kind, **row, "date": datetime.date.today().isoformat()}
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    speeds = read(options.results, "speed")
    if options.speed:
        time_patterns(options, speeds, lambda row: keep("speed", row))
        return
    have = {(row["case"], row["dtype"]) for row in read(options.results, "accuracy")}
    accuracy = None
    for case in grid():
        if options.cases is not None and not {case.name, case.pattern} & set(options.cases):
            continue
        left = [dtype for dtype in (FLOAT, *DTYPES) if (case.name, dtype) not in have]
        if left and accuracy is None:
            accuracy = Accuracy(options.model, options.data, options.samples, options.windows)
        if left and accuracy is not None:
            for row in accuracy.run(case, left):
                keep("accuracy", row)
    text = table(read(options.results, "accuracy"), medians(speeds))
    print(text)
    if options.table:
        put(options.table, "patterns.py", text)


if __name__ == "__main__":
    main()
