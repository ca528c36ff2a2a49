"""`recipe analyze`: which layers quantization hurts, and the `skip:` line that leaves them out."""

from __future__ import annotations

import csv
import io
import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import DataError, Problem, RecipeError
from .console import console, progress
from .files import check_folder

if TYPE_CHECKING:
    from rich.table import Table

    from ..modifiers.analysis.layers import LayerCost
    from ..recipes import DataConfig


class Scheme(str, Enum):
    """The presets of Quantization."""

    W8A8 = "W8A8"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A8 = "W4A8"


class By(str, Enum):
    """What ranks layers; the values are those of `skip: {by: ...}`."""

    output_error = "output_error"
    noise = "noise"
    input_range = "input_range"


MODEL = typer.Argument(
    metavar="MODEL", help="Stub, Hugging Face id, folder or .gguf file.", show_default=False
)
DATA = typer.Option(
    "zoo:python-docs", help="Calibration text: a zoo stub, Hugging Face id, or a .txt or .jsonl."
)
SAMPLES = typer.Option(16, min=1, help="Windows of calibration text.")
LENGTH = typer.Option(512, min=2, help="Tokens in each.")
SCHEME = typer.Option(Scheme.W8A8, help="How the layers would be quantized.")
STATIC = typer.Option(
    False, "--static", help="Int8 inputs with one scale from calibration, instead of one per token."
)
GROUP = typer.Option(None, min=8, help="Inputs that share a weight's scale; 4-bit: 128.")
BY = typer.Option(By.output_error, help="What ranks the layers.")
TOP = typer.Option(10, min=1, help="How many layers to show and to leave in float.")
OUTPUT = typer.Option(
    [],
    "--output",
    "-o",
    metavar="FILE",
    help="Write all layers into this .csv or .json, or draw the top into this .png or .svg. Repeatable.",
)
BAR = 12  # characters of the longest bar in the table
KINDS = ("csv", "json", "png", "svg")


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: recipe analyze zoo:smollm2-135m-instruct --static --output layers.png"
    )(analyze)


def analyze(
    model: str = MODEL,
    data: str = DATA,
    samples: int = SAMPLES,
    length: int = LENGTH,
    scheme: Scheme = SCHEME,
    static: bool = STATIC,
    group_size: int | None = GROUP,
    by: By = BY,
    top: int = TOP,
    output: list[Path] = OUTPUT,
) -> None:
    """Rank layers by what quantizing each alone would cost; print the `skip:` line for Quantization or GPTQ."""
    kinds = [_kind(path) for path in output]
    from ..modifiers.analysis.layers import layer_costs
    from ..modifiers.quantization.schemes import preset
    from ..pipeline.data import calibration_tokens
    from ..pipeline.models import load_model

    config = _data(data, samples, length)
    group = preset(scheme.value, ["Linear"], dynamic=not static, group_size=group_size)
    with progress() as report:
        network, tokenizer = load_model(model, report, dequantize=True)
        costs = layer_costs(network, calibration_tokens(config, tokenizer), group, report)
    inputs = " static" if static else ""
    about = f"{scheme.value}{inputs}, {samples} x {length} tokens of {config.source}"
    show(costs, by, top, about)
    for path, kind in zip(output, kinds, strict=True):
        _write(path, kind, costs, by, top, f"{Path(model).name or model}: layers by cost", about)
        typer.echo(f"✓ {path}")


def _kind(path: Path) -> str:
    """What to write into a file, before anything is measured. Raises RecipeError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        got = path.suffix or "no ending"
        message = f"a table is a .csv or .json file, a picture a .png or .svg, got {got!r}"
        raise RecipeError([Problem(f"--output {path}", 0, 0, message)])
    check_folder(path, f"--output {path}")
    return kind


def _data(dataset: str, samples: int, length: int) -> DataConfig:
    from pydantic import ValidationError

    from ..recipes import DataConfig

    try:
        return DataConfig(dataset=dataset, samples=samples, length=length)
    except ValidationError as error:
        raise DataError(f"--data {dataset!r}: {error.errors()[0]['msg']}") from None


def show(costs: Sequence[LayerCost], by: By, top: int, about: str) -> None:
    """Print the table and the line to paste."""
    from ..modifiers.analysis.layers import ranked

    first = ranked(costs, by.value)[: min(top, len(costs) - 1)]
    share = sum(cost.weights for cost in first) / sum(cost.weights for cost in costs)
    console.print(table(costs, by, top, about))
    console.print()
    console.print(
        f"These {len(first)} layers hold {share:.1%} of the weights. To leave them in floating point:",
        highlight=False,
    )
    lines = (
        f"skip: {{by: {by.value}, top: {len(first)}}}",
        f"skip: {{by: {by.value}, budget: {_percent(share)}}}  # or the best choice of that size",
    )
    for line in lines:
        console.print(f"  {line}", style="bold", markup=False, highlight=False, soft_wrap=True)


def _percent(share: float) -> str:
    """A share as a percentage, never less than it."""
    return f"{share * 100 + 0.05:.1f}%"


def table(costs: Sequence[LayerCost], by: By, top: int, about: str) -> Table:
    """The `top` layers, with a bar on a logarithmic scale for the score that ranks them."""
    from math import log10

    from rich.table import Table

    from ..modifiers.analysis.layers import ranked, short_names

    drawn = Table(box=None, pad_edge=False, header_style="bold", title=about, title_justify="left")
    drawn.add_column("", justify="right", style="dim")
    drawn.add_column("layer", no_wrap=True)
    drawn.add_column("weights", justify="right")
    for name in By:
        drawn.add_column(name.value.replace("_", " "), justify="right", no_wrap=True)
    drawn.add_column("", style="green", no_wrap=True)
    names = short_names([cost.name for cost in costs])
    order = ranked(costs, by.value)
    scores = [max(cost.score(by.value), 1e-30) for cost in order]
    low, high = log10(scores[-1]), log10(scores[0])
    total = sum(cost.weights for cost in costs)
    for rank, (cost, score) in enumerate(zip(order[:top], scores, strict=False), 1):
        bar = "█" * max(1, round(BAR * (log10(score) - low) / ((high - low) or 1.0)))
        cells = [f"{cost.score(name.value):.3g}" for name in By]
        drawn.add_row(str(rank), names[cost.name], f"{cost.weights / total:.2%}", *cells, bar)
    return drawn


def _write(
    path: Path, kind: str, costs: Sequence[LayerCost], by: By, top: int, title: str, about: str
) -> None:
    from ..modifiers.analysis.layers import ranked
    from ..pipeline.durable import write_text, write_whole

    rows = [asdict(cost) for cost in ranked(costs, by.value)]
    if kind == "json":
        text = json_module.dumps({"about": about, "by": by.value, "layers": rows}, indent=2)
        write_text(path, text + "\n")
    elif kind == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, buffer.getvalue())
    else:
        from ..pipeline.analysis_picture import render

        image = render(costs, top, title, about, kind)
        write_whole(path, lambda partial: partial.write_bytes(image))
