"""`recipe export`: the engine's graph of a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from .console import console, progress


class Storage(str, Enum):
    """How the embedding or the logits matrix is stored."""

    keep = "keep"
    f16 = "f16"
    int8 = "int8"


CHECKPOINT = typer.Argument(help="Checkpoint folder, zoo stub or .gguf file.", show_default=False)
OUTPUT = typer.Option(
    None,
    "--output",
    "-o",
    metavar="FOLDER",
    help="Where the graph goes; `graph` inside the checkpoint by default.",
)
HEAD = typer.Option(
    Storage.keep, help="Store the logits matrix as it is, or a copy of it in f16 or int8."
)
EMBEDDING = typer.Option(Storage.keep, help="Store the embedding as it is, or in f16 or int8.")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe export out/smollm2-sparse50-w8a8 --head int8")(export)


def export(
    checkpoint: str = CHECKPOINT,
    output: Path | None = OUTPUT,
    head: Storage = HEAD,
    embedding: Storage = EMBEDDING,
) -> None:
    """Write the graph that the engine runs: graph.json and graph.safetensors."""
    from ..engine.export import export as run
    from ..engine.graph_file import read_graph
    from ..errors import GraphError

    folder = checkpoint_folder(checkpoint)
    if output is None and folder != Path(checkpoint):
        raise GraphError(f"{checkpoint} is not a folder; say where the graph goes with --output")
    with progress() as report:
        written = run(folder, output, head=head.value, embedding=embedding.value, progress=report)
    graph = read_graph(written)
    size = sum(file.bytes for file in graph.files.values())
    console.print(
        f"{written}: {len(graph.tensors)} tensors, {size / 1e6:.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint by path, stub or .gguf file; only the last two import torch."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from ..errors import ModelError
    from ..pipeline.models import resolve_model

    with progress() as report:
        found = resolve_model(name, report)
    if isinstance(found, str):
        raise ModelError(
            f"model {name}: not on this machine; download it first, as with "
            f"`hf download {name} --local-dir FOLDER`"
        )
    return found
