"""`recipe copy`: a recipe of the library as a file of your own."""

from __future__ import annotations

from pathlib import Path

import typer

from .files import check_folder

FILE = typer.Argument(None, help="Where to; NAME.yaml here when left out.")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe copy smollm2-sparse50-w8a8 my-recipe.yaml")(copy)


def copy(
    name: str = typer.Argument(help="A name from `recipe list`.", show_default=False),
    file: Path | None = FILE,
    force: bool = typer.Option(False, "--force", help="Replace a file that is there."),
) -> None:
    """Copy a recipe of the library, to edit it."""
    from ..errors import Problem, RecipeError
    from ..pipeline.durable import write_text
    from ..recipes.library import find

    entry = find(name)
    target = file or Path(f"{entry.name}.yaml")
    if target.is_dir():
        target = target / f"{entry.name}.yaml"
    if target.exists() and not force:
        message = "is there already; give another name, or --force to replace it"
        raise RecipeError([Problem(str(target), 0, 0, message)])
    check_folder(target, str(target))
    write_text(target, entry.path.read_text(encoding="utf-8"))
    typer.echo(
        f"✓ {target}\n  recipe validate {target}\n  recipe apply {target} --output out/{entry.name}"
    )
