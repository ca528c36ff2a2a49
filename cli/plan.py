"""`recipe plan`: a recipe as a timeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ..errors import Problem, RecipeError
from .console import console
from .files import check_folder
from .validate import RECIPE, SET, USE, read_set

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipes.plan import Plan, Row, StagePlan

PICTURE = typer.Option(
    None, "--picture", help="Also draw it into this .png or .svg file.", show_default=False
)
BLOCKS = "▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe plan smollm2-gradual-magnitude60 --picture plan.png")(plan)


def plan(
    recipe: str = RECIPE,
    set_: list[str] = SET,
    use: list[str] = USE,
    picture: Path | None = PICTURE,
) -> None:
    """Show what a recipe does when: each modifier of each stage on the epochs axis, or in its pass."""
    from ..recipes import Recipe
    from ..recipes.plan import Plan

    kind = _picture_kind(picture) if picture else ""
    laid_out = Plan.of(Recipe.load(recipe, set=read_set(set_), use=use), Path(recipe).stem)
    draw(laid_out)
    if picture is not None:
        from ..pipeline.durable import write_whole
        from ..recipes.plan_picture import render

        image = render(laid_out, kind)
        write_whole(picture, lambda partial: partial.write_bytes(image))
        typer.echo(f"\n✓ {picture}")


def _picture_kind(picture: Path) -> str:
    """`png` or `svg`. Raises RecipeError, before anything is drawn, where no picture can be written."""
    kind = picture.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        message = f"a picture is a .png or .svg file, got {picture.suffix or 'no ending'!r}"
        raise RecipeError([Problem(f"--picture {picture}", 0, 0, message)])
    check_folder(picture, f"--picture {picture}")
    return kind


def draw(plan: Plan) -> None:
    """Print a plan."""
    _line(plan.title, "bold")
    for number, stage in enumerate(plan.stages, 1):
        console.print()
        _line(f"{number}  {stage.name} · {stage.run}", "bold cyan")
        _line(f"   {stage.about}", "dim")
        console.print(_training(stage) if stage.rows else _passes(stage))
    console.print()
    for text in plan.after:
        _line(text, "dim")


def _line(text: str, style: str) -> None:
    console.print(text, style=style, markup=False, emoji=False, highlight=False)


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2, 0, 0))


def _passes(stage: StagePlan) -> Table:
    table = _grid()
    table.add_column(width=1)
    table.add_column(style="green", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="dim")
    for number, walk in enumerate(stage.walks, 1):
        for index, row in enumerate(walk.rows):
            what = f"{number}. {walk.what}" if index == 0 else ""
            table.add_row("", what, row.name, escape(row.settings))
    return table


def _training(stage: StagePlan) -> Table:
    names = max(len(row.name) for row in stage.rows)
    paces = max(len(row.pace) for row in stage.rows)
    width = max(20, min(80, console.width - names - paces - 9))
    table = _grid()
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="green", width=width)
    table.add_column(no_wrap=True)
    table.add_row("", "[not bold]epoch", _axis(stage, width), "", style="dim")
    for row in stage.rows:
        table.add_row("", row.name, bar(row, stage.epochs, width), row.pace)
        if row.settings:
            table.add_row("", "", f"[dim default]{escape(row.settings)}", "")
    return table


def bar(row: Row, epochs: float, width: int) -> str:
    """A row on an axis of `width` characters: a line, or a small curve of its sparsity."""
    cells = []
    for index in range(width):
        left, right = index / width * epochs, (index + 1) / width * epochs
        inside = left < row.end and right > row.start
        # What was pruned stays pruned after the end.
        if row.curve and right > row.start and (inside or row.lasting):
            level = [value for epoch, value in row.curve if epoch <= max(left, row.start)][-1]
            top = max(value for _, value in row.curve)
            cells.append(BLOCKS[min(7, int(level / top * 8))] if top else BLOCKS[0])
        else:
            cells.append("━" if inside else " ")
    return "".join(cells)


def _axis(stage: StagePlan, width: int) -> str:
    """Epoch numbers at their places."""
    line = [" "] * width
    for epoch in stage.ticks:
        label = f"{epoch:g}"
        place = min(round(epoch / stage.epochs * width), width - len(label))
        line[place : place + len(label)] = label
    return "".join(line).rstrip()
