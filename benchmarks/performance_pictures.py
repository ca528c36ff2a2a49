"""The pictures that `performance.py` makes of its results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from performance_cases import BATCHED, CONTEXTS, GROWING, PARTS, SEQUENCES, SYSTEMS, Case
from performance_report import Results, batch, growth, growth_picture

COLORS = {
    "Paring": "#c0392b",
    "torch": "#7f8c8d",
    "llama.cpp": "#2471a3",
    "CTranslate2": "#8e44ad",
    "OpenVINO": "#148f77",
    "ONNX": "#b9770e",
    "DeepSparse": "#212f3d",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7e9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def color(name: str) -> str:
    return next(
        (color for start, color in COLORS.items() if name.startswith(start)), COLORS["Paring"]
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The roofline to `file`, and how cost grows beside it; what was not measured is not drawn."""
    results = Results(rows)
    shapes = [
        shape
        for shape in dict.fromkeys(case.shape.name for case in SYSTEMS)
        if any(key[0] == "systems" and key[1] == shape for key in results.found)
    ]
    with plt.rc_context(STYLE):
        if shapes:
            figure, axes = plt.subplots(
                len(shapes), 1, figsize=(8.5, 6 * len(shapes)), squeeze=False
            )
            for shape, axis in zip(shapes, axes[:, 0], strict=True):
                roofline(axis, results, [case for case in SYSTEMS if case.shape.name == shape])
            save(figure, file)
        if any(key[0] != "systems" for key in results.found):
            figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
            against_sparsity(axes[0], results)
            against_context(axes[1], results)
            against_batch(axes[2], results)
            for axis in axes:  # what was not measured leaves its place empty
                axis.set_visible(any(len(line.get_xdata()) for line in axis.lines))
            save(figure, growth_picture(file))


def save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def roofline(axis: Axes, results: Results, cases: list[Case]) -> None:
    """Tokens/s over bytes per token of each system, under what the memory allows."""
    threads = results.threads[-1]
    points = []
    for case in cases:
        speed, size = results.decode(case, threads), results.bytes(case, threads)
        if speed and size:
            points.append((size / 1e6, speed, case.name))
    bandwidth = results.bandwidth_at(threads, "systems")
    if not points or bandwidth is None:
        return
    low, high = min(p[0] for p in points) / 1.25, max(p[0] for p in points) * 1.25
    edge = [low, high]
    axis.plot(edge, [bandwidth / 1e6 / x for x in edge], color="#566573", linewidth=1.3)
    axis.fill_between(edge, [bandwidth / 1e6 / x for x in edge], 1e9, color="#f2f3f4", linewidth=0)
    for size, speed, name in points:
        ours = name.startswith("Paring")
        marker, area = ("o", 42) if ours else ("s", 30)
        axis.scatter(size, speed, s=area, marker=marker, color=color(name), zorder=3, linewidth=0)
    axis.set(xscale="log", yscale="log", xlim=edge)
    top, bottom = bandwidth / 1e6 / low, min(p[1] for p in points)
    axis.set_ylim(bottom / 1.5, top * 1.15)
    label_points(axis, points)
    axis.text(
        0.97,
        0.96,
        f"beyond what memory gives: {bandwidth / 1e9:.1f} GB/s",
        transform=axis.transAxes,
        ha="right",
        va="top",
        color="#566573",
    )
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_major_formatter(PLAIN)
        one.set_minor_locator(NullLocator())
    axis.set_xlabel("MB of weights read per token")
    axis.set_ylabel("tokens/s")
    axis.set_title(f"{cases[0].shape.name}, decoding, {threads} threads", loc="left")


def label_points(axis: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names in a column to the right, the fastest on top, each with a line to its point."""
    bottom, top = axis.get_ylim()
    ordered = sorted(points, key=lambda point: -point[1])
    step = min(0.037, 1 / len(points))
    below, places = 1 + step, []
    for _, speed, _ in ordered:
        below = min(math.log(speed / bottom) / math.log(top / bottom), below - step)
        places.append(below)
    lifted = max(0.0, -places[-1])  # the column may have run out below
    for (size, speed, name), place in zip(ordered, places, strict=True):
        axis.annotate(
            f"{speed:.3g}  {name}",
            (size, speed),
            xytext=(1.03, place + lifted),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=color(name),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color(name),
                "alpha": 0.35,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def against_sparsity(axis: Axes, results: Results) -> None:
    """A line a pattern and number type; dashed with one thread."""
    shades = ("#c0392b", "#e59866", "#2471a3", "#7fb3d5")
    for (pattern, dtype), shade in zip(GROWING, shades, strict=True):
        for threads in results.threads:
            found = growth(results, pattern, dtype, threads)
            most = threads == results.threads[-1]
            axis.plot(
                [100 * sparsity for sparsity in found],
                list(found.values()),
                "o-" if most else "o--",
                markersize=3,
                linewidth=1.5 if most else 0.9,
                color=shade,
                label=f"{pattern} {dtype}" if most and found else None,
            )
    for case in PARTS["sparsity"]:
        speed = results.decode(case, results.threads[-1])
        if "@" not in case.name and speed:
            axis.axhline(speed, color=color(case.name), linewidth=0.9, linestyle=":")
            axis.annotate(
                case.name, (0, speed), xytext=(0, 2), textcoords="offset points", fontsize=7
            )
    axis.set(xlabel="zeros, %", ylabel="tokens/s", ylim=(0, None))
    axis.set_title(
        f"Sparsity: {results.threads[-1]} threads (dashed: fewer); llama.cpp dotted", loc="left"
    )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", fontsize=8)


def against_context(axis: Axes, results: Results) -> None:
    """A line a system; those of an int8 cache are dotted."""
    threads = results.threads[-1]
    cases: dict[str, list[Case]] = {}
    for case in PARTS["context"]:
        cases.setdefault(case.name, []).append(case)
    marks = {"dense int8": "o", "8:16 int8": "s", "4:16 int4": "^", "Q8_0": "o", "Q4_0": "s"}
    for name, some in cases.items():
        found = [(case.length, results.decode(case, threads)) for case in some]
        points = [(length, speed) for length, speed in found if speed]
        if points:
            mark = next(mark for part, mark in marks.items() if part in name)
            mark += "--" if "llama" in name else ":" if "int8 cache" in name else "-"
            axis.plot(*zip(*points, strict=True), mark, markersize=4, color=color(name), label=name)
    axis.set_xscale("symlog", linthresh=256)
    axis.set_xticks(CONTEXTS, [f"{length:,}" for length in CONTEXTS])
    axis.minorticks_off()
    axis.set(xlabel="tokens in the context", ylabel="tokens/s")
    axis.set_ylim(0, 1.4 * axis.get_ylim()[1])  # room for the names
    axis.set_title(f"Context: {threads} threads", loc="left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right", fontsize=8, ncol=2)


def against_batch(axis: Axes, results: Results) -> None:
    """A line a graph."""
    threads = results.threads[-1]
    for name, mark in zip(BATCHED, ("o-", "s-", "^-", "o--"), strict=True):
        found = batch(results, name, threads)
        if found:
            shade = color("Paring") if name != "dense fp32" else color("torch")
            axis.plot(
                *zip(*found.items(), strict=True), mark, markersize=4, color=shade, label=name
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(SEQUENCES, [str(n) for n in SEQUENCES])
    axis.minorticks_off()
    axis.set(xlabel="sequences at once", ylabel="tokens/s of all", ylim=(0, None))
    axis.set_title(f"Batch: Paring, {threads} threads", loc="left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", fontsize=8)
