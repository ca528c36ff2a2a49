"""`recipe schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

from pathlib import Path

import typer

from .validate import USE

OUTPUT = typer.Option(None, "--output", "-o", help="Write to a file instead.")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe schema --output recipe.schema.json")(schema)


def schema(
    output: Path | None = OUTPUT,
    use: list[str] = USE,
) -> None:
    """Print the JSON Schema of a recipe with every modifier; editors complete and check by it.

    With the YAML language server, begin a recipe with
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    import json

    from ..modifiers.base import load_modifiers
    from ..pipeline.durable import write_text
    from ..recipes.json_schema import recipe_schema

    for path in use:
        load_modifiers(path)
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    if output is None:
        typer.echo(text)
    else:
        write_text(output, text + "\n")
        typer.echo(f"✓ {output}")
