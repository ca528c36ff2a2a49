"""The layers that quantization hurts most, as a picture, PNG or SVG. It needs matplotlib: import it only to draw."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from ..modifiers.analysis.layers import LayerCost, ranked, short_names
from ..modifiers.quantization.skip import Score

STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "paring"}
INK, FAINT, GRID, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
COLOURS = ("#3d6fb4", "#c2593f", "#2a9d8f", "#d99a1c", "#8e5bb5", "#5f6c7b", "#b0457b", "#6b8e23")
PANELS: tuple[tuple[Score, str, str], ...] = (
    ("output_error", "output error", "of the block when this layer alone is quantized"),
    ("noise", "expected noise", "of the layer's own output, from grids and energies"),
    ("input_range", "input range", "max - min over the calibration"),
)
WIDTH, BAR, HEAD, FOOT = 13.0, 0.235, 1.25, 0.85  # inches


def render(costs: Sequence[LayerCost], top: int, title: str, about: str, kind: str) -> bytes:
    """The picture as `kind` png or svg. The same costs give the same bytes: no date is kept."""
    figure = draw(costs, top, title, about)
    buffer = BytesIO()
    nameless = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=nameless)
    return buffer.getvalue()


def draw(costs: Sequence[LayerCost], top: int, title: str, about: str) -> Figure:
    """One panel for each score: the `top` layers as bars on a logarithmic axis, coloured by what they are."""
    names = short_names([cost.name for cost in costs])
    kinds = list(dict.fromkeys(cost.name.rpartition(".")[2] for cost in costs))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    count = min(top, len(costs))
    height = HEAD + BAR * count + FOOT
    label = 0.075 * max(len(name) for name in names.values()) + 0.2  # inches left of the bars
    panel = (WIDTH - 0.3) / len(PANELS)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
        figure.text(
            0.3 / WIDTH, 1 - 0.25 / height, title, size=13, weight="bold", color=INK, va="top"
        )
        figure.text(0.3 / WIDTH, 1 - 0.52 / height, about, size=8.5, color=FAINT, va="top")
        for index, (by, name, meaning) in enumerate(PANELS):
            left = (0.3 + panel * index + label) / WIDTH
            box = (left, FOOT / height, (panel - label - 0.35) / WIDTH, BAR * count / height)
            axes = figure.add_axes(box)
            _bars(axes, ranked(costs, by)[:count], by, names, colours)
            text = (0.3 + panel * index) / WIDTH
            figure.text(text, 1 - (HEAD - 0.33) / height, name, size=10, weight="bold", color=INK)
            figure.text(text, 1 - (HEAD - 0.16) / height, meaning, size=7.5, color=FAINT)
        handles = [Patch(color=colours[kind], label=kind) for kind in kinds]
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.2 / WIDTH, 0.1 / height),
            ncols=len(kinds), frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.1,
        )  # fmt: skip
    return figure


def _bars(
    axes: Axes,
    costs: Sequence[LayerCost],
    by: Score,
    names: dict[str, str],
    colours: dict[str, str],
) -> None:
    values = [max(cost.score(by), 1e-30) for cost in costs]
    places = range(len(costs), 0, -1)
    floor = min(values) / (max(values) / min(values)) ** 0.12 / 1.05  # the last bar is still a bar
    axes.set_xscale("log")
    axes.barh(
        list(places), [value - floor for value in values], 0.78, floor,
        color=[colours[cost.name.rpartition(".")[2]] for cost in costs], zorder=2,
    )  # fmt: skip
    axes.set_xlim(floor, max(values) * (max(values) / floor) ** 0.2 * 1.05)
    axes.set_ylim(0.4, len(costs) + 0.6)
    axes.set_yticks(list(places), [names[cost.name] for cost in costs], color=INK, size=8)
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {value:.2g}" if value < 100 else f" {value:,.0f}",
                  va="center", size=7.5, color=FAINT)  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axes.tick_params(axis="both", length=0, colors=FAINT, labelsize=8)
    axes.tick_params(axis="y", labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
