"""`recipe eval`: perplexity of a checkpoint or graph."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import console, progress

if TYPE_CHECKING:
    from ..engine.perplexity import Logits
    from ..engine.protocol import Encode


class Backend(str, Enum):
    """What runs the model."""

    engine = "engine"
    torch = "torch"


MODEL = typer.Argument(
    metavar="PATH",
    help="Checkpoint or graph folder; with torch also a stub or Hugging Face id.",
    show_default=False,
)
DATA = typer.Option(
    ..., help="A text, or a .jsonl file with question and answer.", show_default=False
)
BACKEND = typer.Option(Backend.engine, help="What runs the model.")
WINDOWS = typer.Option(None, min=1, help="Windows of 512 tokens (40), or items of a .jsonl (64).")
THREADS = typer.Option(None, min=1, help="Threads; all CPUs by default.")
JSON = typer.Option(False, "--json", help="Print the result as JSON.")


def register(app: typer.Typer) -> None:
    app.command(
        name="eval",
        epilog="Example: recipe eval out/smollm2-sparse50-w8a8 --data wiki.txt --windows 20",
    )(evaluate)


def evaluate(
    model: str = MODEL,
    data: Path = DATA,
    backend: Backend = BACKEND,
    windows: int | None = WINDOWS,
    threads: int | None = THREADS,
    json: bool = JSON,
) -> None:
    """Perplexity on a file: of windows of text, or of the answers to its questions."""
    from ..engine.protocol import measure

    load = load_engine if backend is Backend.engine else load_torch
    encode, logits = load(model, threads)
    with progress() as report:
        found = measure(data, encode, logits, windows, report)
    if json:
        from json import dumps

        result = asdict(found)
        result["perplexity"] = result.pop("value")
        typer.echo(dumps({"model": model, "data": str(data), "backend": backend.value, **result}))
        return
    kind = "answers" if data.suffix == ".jsonl" else "windows"
    console.print(
        f"perplexity {found.value:.4f} over {found.tokens} tokens of {found.windows} {kind} "
        f"({backend.value})",
        highlight=False,
    )


def load_engine(path: str, threads: int | None) -> tuple[Encode, Logits]:
    """Tokenizer and logits of a graph."""
    from ..engine import Engine
    from ..errors import GraphError

    engine = Engine.load(path, threads=threads)
    if engine.tokenizer is None:
        raise GraphError(f"{path}: the graph has no tokenizer; export a checkpoint that has one")
    return engine.tokenizer.encode_with_places, engine.logits


def load_torch(path: str, threads: int | None) -> tuple[Encode, Logits]:
    """Tokenizer and logits of a model in torch."""
    import torch

    from ..pipeline.models import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    with progress() as report:
        model, tokenizer = load_model(path, report)

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], found["offset_mapping"]

    @torch.inference_mode()
    def logits(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    return encode, logits
