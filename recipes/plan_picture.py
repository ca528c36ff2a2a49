"""A plan as a picture, PNG or SVG. It needs matplotlib: import this module only where one is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .plan import Plan, Row, StagePlan

STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "paring"}

# Inches. The picture is as tall as its stages need.
WIDTH, MARGIN, HEAD, ROW = 10.0, 0.35, 0.62, 0.62
NAMES = 2.1  # left of the bars of a training stage
GAP = 0.3

INK, FAINT, PAPER = "#1f2933", "#7b8794", "#ffffff"
COLOURS = {
    "pruning": "#2a9d8f",
    "smoothing": "#d99a1c",
    "quantization": "#3d6fb4",
    "distillation": "#8e5bb5",
    "training": "#c2593f",
}
OTHER = "#5f6c7b"


def render(plan: Plan, kind: str) -> bytes:
    """The plan as a picture of `kind` png or svg. The same plan gives the same bytes: no date is kept."""
    figure = draw(plan)
    buffer = BytesIO()
    nameless = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=nameless)
    return buffer.getvalue()


def draw(plan: Plan) -> Figure:
    """The plan as a matplotlib figure: one panel for each stage, from top to bottom."""
    heights = [_height(stage) for stage in plan.stages]
    total = MARGIN + 0.15 + sum(heights) + GAP * len(heights) + 0.3 + MARGIN
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, total), facecolor=PAPER)
        top = total - MARGIN
        left = MARGIN / WIDTH
        figure.text(left, top / total, plan.title, size=13, weight="bold", color=INK, va="top")
        top -= 0.15
        for number, (stage, height) in enumerate(zip(plan.stages, heights, strict=True), 1):
            top -= GAP
            _heading(figure, f"{number}  {stage.name}", stage, top, total)
            body = (0, (top - height) / total, 1, (height - HEAD) / total)
            axes = figure.add_axes(body)
            axes.set_axis_off()
            _boxes(axes, stage, height - HEAD) if stage.walks else _bars(axes, stage)
            top -= height
        notes = "    ".join(plan.after)
        figure.text(left, MARGIN / total, notes, size=8, color=FAINT, va="bottom")
    return figure


def _height(stage: StagePlan) -> float:
    if stage.walks:
        return HEAD + 0.45 + ROW * max(len(walk.rows) for walk in stage.walks)
    return HEAD + 0.35 + ROW * max(len(stage.rows), 1)


def _heading(figure: Figure, title: str, stage: StagePlan, top: float, total: float) -> None:
    left = MARGIN / WIDTH
    figure.text(left, top / total, title, size=11, weight="bold", color=INK, va="top")
    kind = {"oneshot": "one-shot", "train": "training"}[stage.run]
    text = f"{kind}  ·  {stage.about}"
    figure.text(left, (top - 0.24) / total, text, size=8.5, color=FAINT, va="top")


def _bars(axes: Axes, stage: StagePlan) -> None:
    """Rows on the epochs axis; a row with a curve is filled up to its sparsity."""
    right = WIDTH - MARGIN
    scale = (right - NAMES - MARGIN) / stage.epochs
    count = max(len(stage.rows), 1)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-0.35, ROW * count)
    if not stage.rows:
        axes.text(MARGIN, 0.33, "no modifiers", color=FAINT, size=9.5, va="center")

    def at(epoch: float) -> float:
        return NAMES + MARGIN + epoch * scale

    for epoch in stage.ticks:
        axes.plot([at(epoch)] * 2, [-0.06, ROW * count], color="#e4e7eb", lw=0.8, zorder=0)
        axes.text(at(epoch), -0.12, f"{epoch:g}", color=FAINT, size=8, ha="center", va="top")
    axes.text(NAMES + MARGIN - 0.15, -0.12, "epoch", color=FAINT, size=8, ha="right", va="top")
    for index, row in enumerate(stage.rows):
        base = ROW * (count - 1 - index)
        colour = COLOURS.get(row.family, OTHER)
        axes.text(MARGIN, base + 0.33, row.name, color=colour, weight="bold", size=9.5, va="center")
        axes.text(MARGIN, base + 0.13, row.pace, color=FAINT, size=7.5, va="center")
        _bar(axes, row, at, base, stage.epochs)


def _bar(axes: Axes, row: Row, at: Callable[[float], float], base: float, epochs: float) -> None:
    colour = COLOURS.get(row.family, OTHER)
    low, tall = base + 0.08, 0.4
    x, width = at(row.start), at(row.end) - at(row.start)
    alpha = 0.16 if row.curve else 0.85
    axes.barh(low, width, tall, x, align="edge", color=colour, alpha=alpha, lw=0)
    note = row.settings
    if row.curve:
        top = max(value for _, value in row.curve) or 1.0
        xs = [at(epoch) for epoch, _ in row.curve]
        ys = [low + tall * value / top for _, value in row.curve]
        axes.fill_between(xs, low, ys, step="post", color=colour, alpha=0.85, lw=0)
        # Held, no longer pruned: what is zero stays zero after the end.
        width = at(epochs) - xs[-1] if row.lasting else 0.0
        axes.barh(low, width, ys[-1] - low, xs[-1], align="edge", color=colour, alpha=0.4, lw=0)
    else:
        space = int(width / 0.062)
        note = textwrap.shorten(note, space, placeholder="…") if space > 8 else ""
        axes.text(x + 0.1, low + tall / 2, note, color=PAPER, size=8, va="center")


def _boxes(axes: Axes, stage: StagePlan, height: float) -> None:
    """A one-shot stage: its walks as boxes from left to right, modifiers stacked in the order they act."""
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, height)
    count = len(stage.walks)
    space = 0.35
    width = min(4.6, (WIDTH - 2 * MARGIN - space * (count - 1)) / count)
    for number, walk in enumerate(stage.walks):
        x = MARGIN + number * (width + space)
        tall = 0.38 + ROW * len(walk.rows)
        y = height - tall
        shape = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y), width, tall, shape, fc="#f5f7fa", ec="#cbd2d9", lw=1))
        axes.text(x + 0.14, height - 0.2, walk.what, color=FAINT, size=8.5, va="center")
        for index, row in enumerate(walk.rows):
            _chip(axes, row, x + 0.12, height - 0.36 - ROW * (index + 1) + 0.06, width - 0.24)
        if number:
            arrow = {"arrowstyle": "-|>", "color": FAINT, "lw": 1.2}
            middle = height - 0.2
            axes.annotate("", (x - 0.03, middle), (x - space + 0.03, middle), arrowprops=arrow)


def _chip(axes: Axes, row: Row, x: float, y: float, width: float) -> None:
    colour = COLOURS.get(row.family, OTHER)
    shape = "round,pad=0,rounding_size=0.05"
    axes.add_patch(FancyBboxPatch((x, y), width, ROW - 0.1, shape, fc=colour, ec="none"))
    middle = y + (ROW - 0.1) / 2
    name = middle + 0.11 if row.settings else middle
    axes.text(x + 0.12, name, row.name, color=PAPER, weight="bold", size=9.5, va="center")
    note = textwrap.shorten(row.settings, max(8, int((width - 0.2) / 0.058)), placeholder="…")
    axes.text(x + 0.12, middle - 0.12, note, color=PAPER, size=7.5, va="center")
