"""The page and the tables that `performance.py` makes of its results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from performance_cases import (
    BATCHED,
    CONTEXTS,
    GROWING,
    OURS,
    PARTS,
    SEQUENCES,
    SMALL,
    SPARSITIES,
    SYSTEMS,
    Case,
)

Row = dict[str, Any]

HEAD = """{machine}; measured {dates} by `python benchmarks/performance.py`, {rounds} rounds in which systems took
turns, one process at a time. Medians over the rounds; ratios and shares are of one round. Batch 1, greedy, random
prompts; prefill is of a new sequence. Read bandwidth, measured in every round: {bandwidth}.{exchange}

Bytes are those of the weights that one decoded token reads (of a peer: of its file). The share of the bandwidth is
bytes times tokens/s over the bandwidth of the round. Paring's sparse graphs are pruned by magnitude, for their speed
alone; what a pattern costs in accuracy is in [patterns.md](patterns.md) and [accuracy.md](accuracy.md).
"""
EXCHANGE = """
A cache line took {:.0f} to {:.0f} ns to another core and back, nearly the same in all runs of a round."""
DEEPSPARSE = """DeepSparse keeps a cache of 32 tokens outside, which flatters it, and has no prefill here. It stores
weights in a form of its own; its bytes are counted as bits of a mask and kept weights."""


class Results:
    """Rows of one machine, with medians over rounds."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.found: dict[tuple[Any, ...], dict[int, Row]] = {}
        self.bandwidth: dict[tuple[Any, ...], list[float]] = {}
        self.errors: dict[tuple[str, str], str] = {}
        for row in self.rows:
            if "decode" in row:
                key = (row["part"], row["model"], row["case"], row["prompt"], row["threads"])
                self.found.setdefault(key, {})[row["round"]] = row
            elif "bandwidth" in row:
                key = (row["part"], row["model"], row["threads"], row["round"])
                self.bandwidth.setdefault(key, []).append(row["bandwidth"])
            elif "error" in row:
                self.errors[row["model"], row["case"]] = row["error"]

    def of(self, case: Case, threads: int) -> dict[int, Row]:
        """Round -> row."""
        key = (case.part, case.shape.name, case.name, case.length, threads)
        return self.found.get(key, {})

    def decode(self, case: Case, threads: int) -> float | None:
        """Tokens per second."""
        return middle(row["decode"] for row in self.of(case, threads).values())

    def prefill(self, case: Case, threads: int, length: int) -> float | None:
        rows = self.of(case, threads).values()
        return middle(row["prefill"][str(length)] for row in rows if str(length) in row["prefill"])

    def ratio(self, case: Case, other: Case, threads: int) -> float | None:
        """Of decode speeds, round by round."""
        ours, theirs = self.of(case, threads), self.of(other, threads)
        return middle(
            ours[turn]["decode"] / theirs[turn]["decode"] for turn in ours if turn in theirs
        )

    def prefill_ratio(self, case: Case, other: Case, threads: int, length: int) -> float | None:
        ours, theirs, key = self.of(case, threads), self.of(other, threads), str(length)
        both = [turn for turn in ours if turn in theirs and key in theirs[turn]["prefill"]]
        return middle(ours[turn]["prefill"][key] / theirs[turn]["prefill"][key] for turn in both)

    def share(self, case: Case, threads: int) -> float | None:
        """Of the bandwidth, round by round."""
        shares = []
        for turn, row in self.of(case, threads).items():
            probes = self.bandwidth[case.part, case.shape.name, threads, turn]
            shares.append(row["decode"] * row["bytes_per_token"] / statistics.median(probes))
        return middle(shares)

    def bytes(self, case: Case, threads: int) -> int | None:
        rows = [*self.of(case, threads).values()]
        return rows[-1]["bytes_per_token"] if rows else None

    def bandwidth_at(self, threads: int, part: str | None = None) -> float | None:
        probes = [
            statistics.median(values)
            for (of, _, count, _), values in self.bandwidth.items()
            if count == threads and part in (None, of)
        ]
        return middle(probes)

    @property
    def threads(self) -> list[int]:
        return sorted({key[-1] for key in self.found})


def middle(values: Iterable[float]) -> float | None:
    """The median, None of nothing."""
    found = [*values]
    return statistics.median(found) if found else None


def shown(value: float | None, digits: int | None = None) -> str:
    """Three digits or so."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if digits is not None else f"{value:,.{0 if value >= 100 else 1}f}"


def markdown(columns: list[str], lines: Iterable[list[str]]) -> str:
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def page(rows: list[Row], picture: Path | None) -> str:
    """All that was measured on one machine, as a Markdown document."""
    results = Results(rows)
    if not results.found:
        return "Nothing was measured yet: `python benchmarks/performance.py`.\n"
    reads = (f"{results.bandwidth_at(n) / 1e9:.1f} GB/s on {n}" for n in results.threads)
    trips = sorted(row["exchange"] for row in rows if "exchange" in row)
    dates = sorted({row["date"] for row in rows if "decode" in row})
    parts = [
        HEAD.format(
            machine=rows[-1]["machine"],
            dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
            rounds=1 + max(row["round"] for row in rows if "decode" in row),
            bandwidth=", ".join(reads).replace(" on 1", " on 1 thread", 1),
            exchange=EXCHANGE.format(trips[0], trips[-1]) if trips else "",
        )
    ]
    if picture is not None and results.threads:
        parts.append(f"![Tokens per second over bytes per token]({picture.name})\n")
    for shape in dict.fromkeys(case.shape.name for case in SYSTEMS):
        cases = [case for case in SYSTEMS if case.shape.name == shape]
        if any(results.of(case, n) for case in cases for n in results.threads):
            parts += [f"## {shape}\n", cases[0].shape.note + "\n", systems_table(results, cases)]
            parts += [best(results, cases) if shape == SMALL.name else "", not_run(results, cases)]
    parts += [memory_table(results), sparsity_tables(results), context_table(results)]
    parts.append(batch_table(results))
    if picture is not None and any(key[0] != "systems" for key in results.found):
        parts.append(f"![How cost grows]({growth_picture(picture).name})\n")
    parts.append(versions(results))
    return "\n".join(part for part in parts if part)


def growth_picture(picture: Path) -> Path:
    """The second picture beside the first."""
    return picture.with_name(f"{picture.stem}-growth{picture.suffix}")


def systems_table(results: Results, cases: list[Case]) -> str:
    """A line a system; ratios with the goal in brackets."""
    most = results.threads[-1]
    lengths = cases[0].shape.prefill
    by_name = {case.name: case for case in cases}
    columns = ["system", *(f"decode, {n} thread{'s' * (n > 1)}" for n in results.threads)]
    columns += [*(f"prefill {length}" for length in lengths), "MB per token", "of the bandwidth"]
    columns.append("ratio, " + ", ".join(map(str, results.threads)) + " threads (goal)")
    lines = []
    for case in cases:
        if not any(results.of(case, n) for n in results.threads):
            continue
        size = results.bytes(case, most)
        share = results.share(case, most)
        ratios = (ratio(results, case, by_name[name], goal) for name, goal in case.goals)
        line = [case.name, *(shown(results.decode(case, n)) for n in results.threads)]
        line += [shown(results.prefill(case, most, length)) for length in lengths]
        line += [shown(size / 1e6 if size else None), f"{share:.0%}" if share else ""]
        lines.append([*line, "; ".join(text for text in ratios if text)])
    return markdown(columns, lines)


def ratio(results: Results, case: Case, other: Case, goal: float | None) -> str:
    """As in `1.3, 1.4 x llama.cpp Q8_0 (1.9)`; empty if the two had no round in common."""
    found = [shown(results.ratio(case, other, n), 2) for n in results.threads]
    if not any(found):
        return ""
    wanted = f" ({goal:g})" if goal else ""
    return f"{', '.join(text for text in found if text)} x {other.name}{wanted}"


def best(results: Results, cases: list[Case]) -> str:
    """The best sparse case against both dense fp32, and prefill against the fastest peer."""
    most = results.threads[-1]
    by_name = {case.name: case for case in cases}
    ours = [c for c in cases if c.name.startswith("Paring") and results.decode(c, most)]
    sparse = [case for case in ours if "dense" not in case.name]
    lines = []
    if sparse:
        top = max(sparse, key=lambda case: results.decode(case, most) or 0)
        against = [("torch FP32", 18), ("Paring dense fp32", 9)]
        texts = [ratio(results, top, by_name[n], goal) for n, goal in against if n in by_name]
        lines.append("; ".join([f"Fastest sparse: {top.name}", *filter(None, texts)]) + ".")
    for length in cases[0].shape.prefill:
        peers = [c for c in cases if c not in ours and results.prefill(c, most, length)]
        if ours and peers:
            top, rival = (
                max(some, key=lambda case: results.prefill(case, most, length) or 0)
                for some in (ours, peers)
            )
            found = results.prefill_ratio(top, rival, most, length)
            text = f"{shown(found, 2)} x {rival.name} (2)"
            lines.append(f"Prefill of {length}, threads {most}: {top.name}, {text}.")
    return "".join(f"- {line}\n" for line in lines)


def not_run(results: Results, cases: list[Case]) -> str:
    """Why a system has no line."""
    lines = []
    for case in cases:
        error = results.errors.get((case.shape.name, case.name))
        if error and not any(results.of(case, n) for n in results.threads):
            lines.append(f"- {case.name} did not run: {error.replace('|', '/')[:200]}\n")
    return "".join(lines)


def growth(results: Results, pattern: str, dtype: str, threads: int) -> dict[float, float]:
    """Sparsity -> tokens per second."""
    cases = {case.name: case for case in PARTS["sparsity"]}
    found = {s: results.decode(cases[f"{pattern}@{s:g}/{dtype}"], threads) for s in SPARSITIES}
    return {s: speed for s, speed in found.items() if speed is not None}


def sparsity_tables(results: Results) -> str:
    """Tokens/s against sparsity and threads."""
    lines = []
    for pattern, dtype in GROWING:
        for threads in results.threads:
            found = growth(results, pattern, dtype, threads)
            if found:
                cells = [shown(found.get(sparsity)) for sparsity in SPARSITIES]
                lines.append([f"{pattern} {dtype}", str(threads), *cells])
    for case in PARTS["sparsity"]:
        if "@" not in case.name:
            for threads in results.threads:
                speed = results.decode(case, threads)
                if speed is not None:
                    lines.append([case.name, str(threads), shown(speed), *[""] * 8])
    if not lines:
        return ""
    columns = ["tokens/s", "threads", *(f"{sparsity:.0%}" for sparsity in SPARSITIES)]
    shape = PARTS["sparsity"][0].shape
    title = f"## Speed against sparsity\n\n{shape.name}, {shape.tokens} tokens after a prompt of {shape.prompt}.\n\n"
    return title + markdown(columns, lines)


def context_table(results: Results) -> str:
    """Tokens/s against tokens already in the context; the goal is 0.7 at 2048."""
    by_name: dict[str, dict[int, Case]] = {}
    for case in PARTS["context"]:
        by_name.setdefault(case.name, {})[case.length] = case
    lines = []
    for name, cases in by_name.items():
        for threads in results.threads:
            found = [results.decode(cases[length], threads) for length in CONTEXTS]
            kept = results.ratio(cases[2048], cases[1], threads)
            if any(found):
                lines.append([name, str(threads), *map(shown, found), shown(kept, 2)])
    if not lines:
        return ""
    columns = ["tokens/s", "threads", *(f"after {length:,}" for length in CONTEXTS)]
    title = "## Speed against context\n\n"
    return title + markdown([*columns, "2,048 over 1 (goal 0.7)"], lines)


def batch(results: Results, name: str, threads: int) -> dict[int, float]:
    """Sequences decoded together -> tokens per second of all."""
    cases = {case.name: case for case in PARTS["batch"]}
    found = {n: results.decode(cases[f"Paring {name} *{n}"], threads) for n in SEQUENCES}
    return {n: speed for n, speed in found.items() if speed is not None}


def batch_table(results: Results) -> str:
    """Tokens/s of all sequences against how many there are; the goal is 3.5 at eight."""
    cases = {case.name: case for case in PARTS["batch"]}
    lines = []
    for name in BATCHED:
        for threads in results.threads:
            found = batch(results, name, threads)
            eight, one = (cases[f"Paring {name} *{n}"] for n in (8, 1))
            if found:
                cells = [shown(found.get(n)) for n in SEQUENCES]
                ratio = shown(results.ratio(eight, one, threads), 2)
                lines.append([f"Paring {name}", str(threads), *cells, ratio])
    if not lines:
        return ""
    columns = ["tokens/s", "threads", *map(str, SEQUENCES), "8 over 1 (goal 3.5)"]
    return "## Several sequences at once\n\n" + markdown(columns, lines)


def memory_table(results: Results) -> str:
    """Load time, and resident memory after decoding, for Paring beside its packed bytes and the cache."""
    lines = []
    for case in SYSTEMS:
        rows = [row for n in results.threads for row in results.of(case, n).values()]
        rows = [row for row in rows if "load_seconds" in row]
        if not rows or case.shape.name != SMALL.name:
            continue
        seconds = statistics.median(row["load_seconds"] for row in rows)
        resident = statistics.median(row["resident_bytes"] for row in rows)
        line = [case.name, f"{seconds:.2f}", f"{resident / 1e6:.0f}"]
        if case.peer == OURS:
            longest = max(case.length + case.shape.tokens, *case.shape.prefill)
            packed = rows[0]["packed_bytes"] + rows[0]["cache_bytes_per_token"] * longest
            line += [f"{packed / 1e6:.0f}", f"{resident / packed:.2f}"]
        lines.append(line + [""] * (5 - len(line)))
    if not lines:
        return ""
    columns = ["system", "load, s (goal 1)", "resident MB", "packed and cache MB"]
    title = f"## Load time and memory\n\n{SMALL.name}, after decoding; without what was imported before.\n\n"
    return title + markdown([*columns, "resident over these (goal 1.2)"], lines)


def versions(results: Results) -> str:
    """What was compared."""
    found: dict[str, set[str]] = {}
    for key, rounds in results.found.items():
        system = (
            "Paring" if "@" in key[2] else " ".join(key[2].split()[: 2 if "ONNX" in key[2] else 1])
        )
        found.setdefault(system, set()).update(row["version"] for row in rounds.values())
    lines = (f"{name} {' and '.join(sorted(some))}" for name, some in sorted(found.items()))
    text = "## Versions\n\n" + "; ".join(lines) + ".\n"
    return text + ("\n" + DEEPSPARSE + "\n" if "DeepSparse" in found else "")
