"""`recipe show`: a recipe as it is written, or resolved."""

from __future__ import annotations

import typer

from .console import console
from .validate import RECIPE, SET, USE, read_set


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe show smollm2-sparse50-w8a8")(show)


def show(
    recipe: str = RECIPE,
    resolved: bool = typer.Option(
        False, "--resolved", help="With every expression computed, as `apply` saves it."
    ),
    set_: list[str] = SET,
    use: list[str] = USE,
) -> None:
    """Print a recipe from the library or from a file."""
    if resolved or set_:
        from ..recipes import Recipe

        text = Recipe.load(recipe, set=read_set(set_), use=use).to_yaml()
    else:
        from ..recipes.library import read_recipe

        text, _ = read_recipe(recipe)
    text = text.rstrip("\n")
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(text)
