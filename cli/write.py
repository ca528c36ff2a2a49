"""`recipe write`: text by the model itself, to calibrate and recover on."""

from __future__ import annotations

from pathlib import Path

import typer

from .console import progress
from .files import check_folder

MODEL = typer.Argument(help="Stub, Hugging Face id or folder of the model.", show_default=False)
OUTPUT = typer.Option(..., "--output", "-o", help="The .jsonl file to write.", show_default=False)
TEXTS = typer.Option(240, min=1, help="How many texts.")
LENGTH = typer.Option(320, min=1, help="Tokens of each.")
TEMPERATURE = typer.Option(0.8, min=0.01, help="Lower is likelier and more alike.")
TOP_P = typer.Option(0.95, min=0.01, max=1.0, help="Draw among the likeliest of this probability.")
SEED = typer.Option(0, min=0, help="Same seed, same texts.")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe write zoo:smollm2-135m-instruct --output own.jsonl")(write)


def write(
    model: str = MODEL,
    output: Path = OUTPUT,
    texts: int = TEXTS,
    length: int = LENGTH,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = SEED,
) -> None:
    """Let a model write text: data for calibration and recovery of what it knows, where nobody has its own."""
    from ..errors import DataError

    if output.suffix != ".jsonl":
        raise DataError(f"--output {output}: the texts become a .jsonl file; name it so")
    check_folder(output, f"--output {output}")
    from ..pipeline.models import load_model
    from ..pipeline.own_text import store_texts, write_texts

    with progress() as report:
        network, tokenizer = load_model(model, report)
        written = write_texts(
            network,
            tokenizer,
            texts,
            length,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=report,
        )
    store_texts(output, written)
    typer.echo(f"✓ {output}: {texts} texts, {texts * length} tokens")
