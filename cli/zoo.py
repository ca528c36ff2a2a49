"""`recipe zoo`: the models and texts that recipes can name."""

from __future__ import annotations

import typer

from .console import console, progress


def register(app: typer.Typer) -> None:
    zoo = typer.Typer(
        help="List, show and fetch the models and texts that recipes can name.",
        epilog="Example: recipe zoo fetch zoo:smollm2-135m-instruct",
        no_args_is_help=True,
    )
    zoo.command("list", epilog="Example: recipe zoo list")(list_cards)
    zoo.command(epilog="Example: recipe zoo show zoo:python-docs")(show)
    zoo.command(epilog="Example: recipe zoo fetch zoo:smollm2-135m-instruct")(fetch)
    zoo.command(epilog="Example: recipe zoo where zoo:smollm2-135m-instruct")(where)
    app.add_typer(zoo, name="zoo")


STUB = typer.Argument(help="A stub, as zoo:smollm2-135m-instruct.", show_default=False)


def list_cards() -> None:
    """List every card."""
    from rich.table import Table

    from .. import zoo

    table = Table("stub", "kind", "licence", "title", box=None, pad_edge=False)
    for card in zoo.cards():
        table.add_row(card.stub, card.kind, card.licence, card.title)
    console.print(table)


def show(stub: str = STUB) -> None:
    """Show a card."""
    import yaml

    from .. import zoo

    text = yaml.safe_dump(zoo.card(stub).model_dump(), sort_keys=False, width=100)
    console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)


def fetch(stub: str = STUB) -> None:
    """Download a model, check it against its card, and print where it lies."""
    from .. import zoo

    with progress() as report:
        folder = zoo.fetch(stub, progress=report)
    console.print(str(folder), markup=False, highlight=False, soft_wrap=True)


def where(stub: str = STUB) -> None:
    """Print where a fetched model lies."""
    from .. import zoo

    console.print(str(zoo.where(stub)), markup=False, highlight=False, soft_wrap=True)
