"""`recipe apply`: pare a model down by a recipe."""

from __future__ import annotations

from pathlib import Path

import typer

from .console import console, progress
from .validate import RECIPE, SET, USE, read_set

OUTPUT = typer.Option(
    ..., "--output", "-o", help="Folder for checkpoint, graph and report.", show_default=False
)
MODEL = typer.Option(
    None,
    "--model",
    "-m",
    metavar="MODEL",
    help="Stub, Hugging Face id, folder or .gguf file, instead of the recipe's model.",
)


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: recipe apply smollm2-sparse50-w8a8 --output out/smollm2-sparse50-w8a8"
    )(apply)


def apply(
    recipe: str = RECIPE,
    output: Path = OUTPUT,
    model: str | None = MODEL,
    set_: list[str] = SET,
    use: list[str] = USE,
    fresh: bool = typer.Option(False, "--fresh", help="Forget what is in --output; start over."),
    evaluate: bool = typer.Option(True, help="Measure perplexity and speed, before and after."),
    verify: bool = typer.Option(
        False, "--verify", help="Load the checkpoint with transformers and compare logits."
    ),
    device: str | None = typer.Option(
        None,
        metavar="DEVICE",
        help="Where one-shot stages compute, such as cpu or cuda; if not given, a GPU that has room, else the CPU.",
        show_default=False,
    ),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON instead of a table."),
) -> None:
    """Pare a model down by a recipe: checkpoint, graph for the engine, and what changed.

    Run it again after a crash and it goes on where it stopped.
    """
    from ..pipeline import apply as run
    from ..recipes import Recipe

    loaded = Recipe.load(recipe, set=read_set(set_), model=model, use=use)
    with progress() as report:
        result = run(
            loaded,
            output=output,
            resume=not fresh,
            evaluate=evaluate,
            verify=verify,
            device=device,
            progress=report,
        )
    if not result.report:  # one of several processes; the first tells
        return
    if json:
        from json import dumps

        typer.echo(dumps(result.report, indent=2))
        return
    from ..pipeline.report import summary_table

    console.print()
    console.print(summary_table(result.report))
    console.print()
    console.print(
        f'Next: recipe generate {output} "Why do bees dance?"', highlight=False, soft_wrap=True
    )
