"""`recipe convert`: a recipe of SparseML or llm-compressor as a native one."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import Problem, RecipeError
from .console import errors
from .files import check_folder
from .validate import USE

OUTPUT = typer.Option(
    None, "--output", "-o", help="Write to a file instead of printing.", show_default=False
)


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe convert sparseml-recipe.yaml --output my-recipe.yaml")(
        convert
    )


def convert(
    recipe: Path = typer.Argument(help="A recipe of SparseML or llm-compressor: YAML or Markdown."),
    output: Path | None = OUTPUT,
    use: list[str] = USE,
) -> None:
    """Write a recipe of SparseML or llm-compressor natively; what changes on the way is noted.

    What has no native equal is told with its place in the old file, and nothing is written.
    """
    from ..modifiers.base import load_modifiers
    from ..pipeline.durable import write_text
    from ..recipes.build import build_document, read_document
    from ..recipes.dump import write_yaml
    from ..recipes.library import read_recipe

    for path in use:
        load_modifiers(path)
    if output is not None:
        check_folder(output, f"--output {output}")
    text, source = read_recipe(recipe)
    document, notes = read_document(text, source)
    build_document(document, {})
    if not notes:
        raise RecipeError(
            [Problem(source, 0, 0, "is a native recipe; there is nothing to convert")]
        )
    header = [f"Converted from {recipe.name} by recipe convert.", *(f"- {note}" for note in notes)]
    native = "".join(f"# {line}\n" for line in header) + write_yaml(document.data, resolved=False)
    for note in notes:
        errors.print(f"note: {note}", markup=False, emoji=False, highlight=False, soft_wrap=True)
    if output is None:
        typer.echo(native, nl=False)
    else:
        write_text(output, native)
        typer.echo(f"✓ {output}")
