"""The pictures of report.html, as SVG text. They need matplotlib: import this module only where they are drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]
"""(step, value)"""
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#3d6fb4", "#2a9d8f", "#c2593f", "#8e5bb5", "#d99a1c", "#5f6c7b", "#b4568a", "#6b8e23")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "svg.hashsalt": "paring",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
WIDTH = 10.0  # inches
SMOOTHED = 60  # steps from which on a curve is drawn smoothed, the raw one faint
EXACT = frozenset({"learning rate"})  # curves without noise


def curves(panels: Mapping[str, Curve], scheduled: Mapping[str, Curve]) -> str:
    """A panel for each curve over the steps; `scheduled` lies dashed over the panel called `sparsity`."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, curve), colour in zip(grid, panels.items(), _endless(), strict=False):
            steps, values = (np.array(part, dtype=float) for part in zip(*curve, strict=True))
            axes.set_title(name)
            if name == "sparsity":
                _sparsity(axes, steps, values, scheduled)
            else:
                _line(axes, steps, values, colour, name not in EXACT)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("optimizer step")

    return _svg(draw, WIDTH, 0.4 + 1.9 * rows)


def _line(axes: Axes, steps: Any, values: Any, colour: str, smooth: bool) -> None:
    if len(steps) < SMOOTHED or not smooth:
        axes.plot(steps, values, color=colour, lw=1.5, marker="o" if len(steps) == 1 else None)
        return
    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
    keep = 1 - 1 / max(len(steps) / 25, 4)
    mean, weight, total = [], 0.0, 0.0
    for value in values:  # a running mean that forgets, without the pull of its first value
        total, weight = keep * total + value, keep * weight + 1
        mean.append(total / weight)
    axes.plot(steps, mean, color=colour, lw=1.6)


def _sparsity(axes: Axes, steps: Any, values: Any, scheduled: Mapping[str, Curve]) -> None:
    axes.plot(steps, 100 * values, color=COLOURS[1], lw=2.2, label="actual", drawstyle="steps-post")
    for name, curve in scheduled.items():
        x, y = zip(*curve, strict=True)
        axes.plot(
            x,
            100 * np.array(y),
            color=INK,
            lw=1,
            ls=(0, (4, 3)),
            label=f"{name}, scheduled",
            drawstyle="steps-post",
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("%")
    axes.legend(loc="lower right")


def layers(values: Mapping[str, float], title: str, percent: bool) -> str | None:
    """A cell for each layer: blocks from left to right, kinds of layer from top to bottom; None without blocks."""
    kinds, blocks = _places(values)
    if not kinds:
        return None
    table = np.full((len(kinds), max(blocks) + 1), np.nan)
    for name, value in values.items():
        if place := split_name(name):
            table[kinds.index(place[1]), place[0]] = 100 * value if percent else value
    positive = table[np.isfinite(table) & (table > 0)]
    spread = not percent and positive.size > 0 and positive.max() > 20 * positive.min()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        top = 100.0 if percent else max(float(np.nanmax(table)), 1e-12)
        norm = LogNorm(positive.min(), positive.max()) if spread else Normalize(0.0, top)
        colours = "Greens" if percent else "OrRd"
        mesh = axes.pcolormesh(table, cmap=colours, norm=norm, ec="white", lw=0.8)
        axes.invert_yaxis()
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, [k.rpartition(".")[2] for k in kinds])
        every = max(1, table.shape[1] // 15)
        marks = np.arange(0, table.shape[1], every)
        axes.set_xticks(marks + 0.5, [str(m) for m in marks])
        axes.tick_params(length=0)
        axes.set_xlabel("block")
        axes.set_title(title)
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=12)
        bar.outline.set_visible(False)
        if spread:
            _plain_numbers(bar.ax)
        if table.shape[1] <= 12:
            _numbers(axes, table, mesh)

    return _svg(draw, WIDTH, 1.0 + 0.27 * len(kinds))


def _numbers(axes: Axes, table: Any, mesh: Any) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = float(mesh.norm(value)) > 0.6
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.3g}",
                ha="center",
                va="center",
                size=7.5,
                color="white" if dark else INK,
            )


def ranges(values: Mapping[str, Sequence[float]]) -> str | None:
    """Input ranges over the blocks, (before, after) of each layer: a line for each kind, before dashed."""
    kinds, _ = _places(values)
    if not kinds:
        return None
    lines: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for kind in kinds:  # kinds that read the same input share a line
        names = sorted((p[0], name) for name in values if (p := split_name(name)) and p[1] == kind)
        key = tuple((float(block), *map(float, values[name])) for block, name in names)
        lines.setdefault(key, []).append(kind.rpartition(".")[2])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (points, names), colour in zip(lines.items(), _endless(), strict=False):
            x, before, after = zip(*points, strict=True)
            axes.plot(x, before, color=colour, lw=1.1, ls=(0, (3, 2)), alpha=0.75)
            axes.plot(x, after, color=colour, lw=1.8, marker=".", ms=5, label=", ".join(names))
        axes.plot([], [], color=FAINT, lw=1.1, ls=(0, (3, 2)), label="before")
        axes.set_yscale("log")
        _plain_numbers(axes)
        axes.set_xlabel("block")
        axes.set_title("Largest minus smallest input of each layer, after (before dashed)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _svg(draw, WIDTH, 3.0)


def blocks(values: Sequence[float]) -> str:
    """Errors over the blocks; logarithmic where they spread."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(range(len(values)), values, color=COLOURS[2], lw=1.8, marker=".")
        found = [value for value in values if value > 0]
        if found and max(found) > 20 * min(found):
            axes.set_yscale("log")
            _plain_numbers(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("block")
        axes.set_title("Relative squared error of each block's output")

    return _svg(draw, WIDTH, 2.4)


def _plain_numbers(axes: Axes) -> None:
    """10, 20, 50, 100: not powers of ten in TeX, which is not parsed here."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def split_name(name: str) -> tuple[int, str] | None:
    """(3, `mlp.up_proj`) of `model.layers.3.mlp.up_proj`; None where no block is named."""
    found = re.fullmatch(r"\D*?\.?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def _places(names: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Kinds of layer in their order, and blocks."""
    found = [place for name in names if (place := split_name(name))]
    return list(dict.fromkeys(kind for _, kind in found)), sorted({block for block, _ in found})


def _endless() -> Iterator[str]:
    return cycle(COLOURS)


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return inline(text.getvalue())


def inline(svg: str) -> str:
    """An SVG file as an element of an HTML page that fits its column."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'
