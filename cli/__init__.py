"""The `recipe` command. Each file beside this one but console.py and files.py is a command: it has `register(app)`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import typer

from ..errors import ParingError
from .console import errors

# In the order of `recipe --help`.
COMMANDS = (
    *("apply", "generate", "chat"),
    *("list", "show", "copy", "validate", "plan", "schema", "convert"),
    *("analyze", "write", "eval", "bench", "export"),
    "zoo",
)


def application() -> typer.Typer:
    """The whole command line. Nothing heavy is imported before a command runs."""
    app = typer.Typer(
        name="recipe",
        help="Pare language models down by a recipe, and decode the result on CPUs.",
        epilog="Example: recipe apply smollm2-sparse50-w8a8 --output out/smollm2-sparse50-w8a8",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        # A traceback means a bug of Paring; it is printed as Python prints it.
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    for name in COMMANDS:
        if find_spec(f"{__name__}.{name}") is not None:
            import_module(f".{name}", __name__).register(app)
    return app


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(installed("paring"))
        raise typer.Exit()


def options(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """The options of `recipe` itself."""


def main() -> None:
    """Run the command line; bad input ends with its message on stderr and exit status 2."""
    try:
        application()(prog_name="recipe")
    except ParingError as error:
        errors.print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
