"""`recipe bench`: how fast a graph decodes, alone or against another one."""

from __future__ import annotations

import json as json_module
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .console import console, progress
from .export import checkpoint_folder

if TYPE_CHECKING:
    from rich.table import Table

    from ..engine.benchmark import Benchmark, Speed

GRAPH = typer.Argument(metavar="PATH", help="Checkpoint or graph folder.", show_default=False)
AGAINST = typer.Option(
    None,
    metavar="dense|PATH",
    help="Take turns with another graph; `dense` is the FP32 model that the recipe began with.",
)
PROMPT = typer.Option(128, min=1, help="Tokens to prefill.")
TOKENS = typer.Option(128, min=1, help="Tokens to decode.")
THREADS = typer.Option(None, min=1, help="Threads; all CPUs by default.")
KERNELS = typer.Option("auto", help="Row of kernels; the best that this CPU has by default.")
ROUNDS = typer.Option(3, min=1, help="How often everything is timed.")
SEQUENCES = typer.Option(1, min=1, help="Also time so many sequences decoded together.")
JSON = typer.Option(False, "--json", help="Print the result as JSON.")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe bench out/smollm2-sparse50-w8a8 --against dense")(bench)


def bench(
    path: Path = GRAPH,
    against: str | None = AGAINST,
    prompt: int = PROMPT,
    tokens: int = TOKENS,
    threads: int | None = THREADS,
    kernels: str = KERNELS,
    rounds: int = ROUNDS,
    sequences: int = SEQUENCES,
    json: bool = JSON,
) -> None:
    """Tokens per second of decoding and prefill, load time and memory."""
    from ..engine.benchmark import benchmark

    with baseline(path, against) as other, progress() as report:
        found = benchmark(
            path,
            other,
            prompt=prompt,
            tokens=tokens,
            threads=threads,
            kernels=kernels,
            rounds=rounds,
            sequences=sequences,
            progress=report,
        )
    if json:
        typer.echo(json_module.dumps(found.to_json(), indent=2))
    else:
        console.print(table(found, "dense FP32" if against == "dense" else "baseline"))


@contextmanager
def baseline(path: Path, against: str | None) -> Iterator[Path | None]:
    """The graph to compare with; the dense one is exported for the time of the run."""
    if against != "dense":
        yield None if against is None else Path(against)
        return
    from ..engine.export import export

    base = checkpoint_folder(base_model(path))
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        with progress() as report:  # ends before the benchmark's own begins
            dense = export(base, Path(folder) / "dense", progress=report)
        yield dense


def base_model(path: Path) -> str:
    """The model that a recipe began with, as report.json beside the graph names it."""
    from ..engine.checkpoint import read_object
    from ..engine.graph_file import find_graph
    from ..errors import ModelError

    for folder in (path, find_graph(path).parent):
        if (folder / "report.json").is_file():
            model = read_object(folder / "report.json").get("model")
            if isinstance(model, str):
                return model
    raise ModelError(
        f"{path}: no report.json names the dense model; export it with `recipe export` and give "
        "that graph to --against"
    )


def table(found: Benchmark, name: str) -> Table:
    """Speeds and sizes, with the baseline and the ratio where there is one."""
    from rich.table import Table

    title = f"{found.machine}, {found.threads} threads, kernels {found.speed.kernels}"
    drawn = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    drawn.add_column("")
    speeds: list[tuple[str, Speed]] = [("this graph", found.speed)]
    if found.baseline is not None:
        speeds.append((name, found.baseline))
    for header in [header for header, _ in speeds] + ["ratio"] * (found.baseline is not None):
        drawn.add_column(header, justify="right")
    rows = [
        (f"decode {found.tokens} tokens, tokens/s", [f"{s.decode_median:.1f}" for _, s in speeds]),
        (
            f"prefill {found.prompt} tokens, tokens/s",
            [f"{s.prefill_median:.1f}" for _, s in speeds],
        ),
        *(
            (f"one token, {p}, ms", [f"{s.token_ms[p]:.2f}" for _, s in speeds])
            for p in ("p50", "p90", "p99")
        ),
        ("load, s", [f"{s.load_seconds:.2f}" for _, s in speeds]),
        *(
            (label, [f"{getattr(s, field) / 1e6:.1f}" for _, s in speeds])
            for label, field in (
                ("memory, MB", "resident_bytes"),
                ("packed weights, MB", "packed_bytes"),
                ("read per token, MB", "bytes_per_token"),
                ("on disk, MB", "file_bytes"),
            )
        ),
        ("sparsity", [f"{s.sparsity:.1%}" for _, s in speeds]),
    ]
    if found.sequences > 1:
        cells = [f"{s.together_median:.1f} ({s.together_ratio:.2f} x one)" for _, s in speeds]
        rows.insert(2, (f"{found.sequences} sequences together, tokens/s", cells))
    ratios = {0: found.decode_ratio, 1: found.prefill_ratio}
    for index, (label, cells) in enumerate(rows):
        ratio = ratios.get(index)
        drawn.add_row(label, *cells, *([f"{ratio:.2f} x"] if ratio is not None else []))
    return drawn
