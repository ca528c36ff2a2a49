"""`recipe list`: the library, a line for each recipe."""

from __future__ import annotations

import typer

from .console import console

WORDS = typer.Argument(None, help="Only recipes with all of these words.")


def register(app: typer.Typer) -> None:
    app.command("list", epilog="Example: recipe list sparse")(list_recipes)


def list_recipes(
    words: list[str] = WORDS,
    names: bool = typer.Option(False, "--names", help="Print bare names, for scripts."),
) -> None:
    """List the recipes that come with Paring."""
    from rich.table import Table

    from ..recipes.library import entries

    found = [
        entry
        for entry in entries()
        if all(word.lower() in f"{entry.name} {entry.header}".lower() for word in words or [])
    ]
    if names:
        for entry in found:
            typer.echo(entry.name)
        return
    width = max((len(entry.name) for entry in found), default=0)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for entry in found:
        if console.is_terminal:
            table.add_row(entry.name, entry.summary)
        else:  # a line each, for grep
            line = f"{entry.name:{width}}  {entry.summary}"
            typer.echo(line)
    if table.rows:
        console.print(table)
    if not found:
        console.print(f"No recipe has {' and '.join(words)} in its name or description.")
    elif console.is_terminal:
        console.print(
            "\n[dim]recipe show NAME prints one, recipe copy NAME puts it here to edit.[/]"
        )
