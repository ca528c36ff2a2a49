"""`recipe generate`: continue a prompt with the C++ engine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DataError
from .console import errors, progress

if TYPE_CHECKING:
    from ..engine import Engine, Generation, Timings


class Cache(str, Enum):
    """How keys and values are kept."""

    auto = "auto"
    f32 = "f32"
    f16 = "f16"
    int8 = "int8"


PATH = typer.Argument(
    help="Checkpoint folder with a graph, or the graph's own folder.", show_default=False
)
MAX_TOKENS = typer.Option(128, "--max-tokens", "-n", min=1, help="Most tokens to add.")
TOP_K = typer.Option(0, min=0, help="Draw among this many likeliest tokens; 0 = all.")
SEED = typer.Option(0, min=0, help="Same seed, same text.")
STOP = typer.Option([], help="End before this text; may be given several times.")
THREADS = typer.Option(None, min=1, help="Threads to compute with; all CPUs by default.")
KERNELS = typer.Option(
    "auto", help="Kernel row: auto, or a name such as avx2; a wrong one lists those that run here."
)
CACHE = typer.Option(
    Cache.auto,
    help="Type of the kept keys and values; auto: int8 if the checkpoint was calibrated for it, "
    "else f16 if the weights are quantized.",
)


def register(app: typer.Typer) -> None:
    app.command(
        epilog='Example: recipe generate out/smollm2-sparse50-w8a8 "The capital of France is"'
    )(generate)


def generate(
    path: Path = PATH,
    prompt: str = typer.Argument(help="Text to continue; - reads it from standard input."),
    max_tokens: int = MAX_TOKENS,
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token."),
    top_k: int = TOP_K,
    top_p: float = typer.Option(1.0, help="Draw among the likeliest that hold this probability."),
    seed: int = SEED,
    stop: list[str] = STOP,
    chat: bool = typer.Option(False, "--chat", help="Ask it as a chat message."),
    threads: int | None = THREADS,
    kernels: str = KERNELS,
    cache: Cache = CACHE,
    json: bool = typer.Option(False, "--json", help="Print one JSON object at the end instead."),
) -> None:
    """Continue a prompt; the text appears as it is made."""
    text = _read_stdin() if prompt == "-" else prompt
    engine = load(path, threads, kernels, cache)
    generation = engine.stream(
        [{"role": "user", "content": text}] if chat else text,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    if not json:
        if not chat:
            typer.echo(text, nl=False)
        print_stream(generation)
        print_timings(generation.completion.timings)
        return
    from json import dumps

    for _ in generation:
        pass
    answer = generation.completion
    found = asdict(answer)
    found["timings"] |= speeds(answer.timings)
    typer.echo(dumps({"prompt": text, **found}, indent=2, ensure_ascii=False))


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt on stdin is not UTF-8 text ({error})") from None


def load(path: Path, threads: int | None, kernels: str, cache: Cache) -> Engine:
    """The engine, with its loading drawn where there is a terminal to draw on."""
    from ..engine import Engine

    if not errors.is_terminal:
        return Engine.load(path, threads, kernels, cache=cache.value)
    with progress() as report:
        return Engine.load(path, threads, kernels, cache=cache.value, progress=report)


def print_stream(generation: Generation) -> None:
    """Pieces on stdout as they come, then a line's end."""
    for piece in generation:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def speeds(timings: Timings) -> dict[str, Any]:
    return {
        "prompt_tokens_per_second": timings.prompt_tokens_per_second,
        "tokens_per_second": timings.tokens_per_second,
    }


def print_timings(timings: Timings) -> None:
    """One dim line on stderr."""
    errors.print(
        f"prompt {timings.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.0f} tokens/s; "
        f"answer {timings.tokens} tokens, {timings.tokens_per_second:.1f} tokens/s",
        style="dim",
        highlight=False,
    )
