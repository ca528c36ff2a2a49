"""`recipe chat`: a conversation with the C++ engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DataError, GraphError
from .console import console, errors
from .generate import (
    CACHE,
    KERNELS,
    PATH,
    SEED,
    STOP,
    THREADS,
    Cache,
    load,
    print_stream,
    print_timings,
)

if TYPE_CHECKING:
    from ..engine import Engine, Generation

# Where neither the command line nor the graph's generation settings say.
DEFAULTS = {"temperature": 0.7, "top_k": 0, "top_p": 0.95}


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe chat out/smollm2-sparse50-w8a8 --temperature 0.2")(chat)


def chat(
    path: Path = PATH,
    system: str | None = typer.Option(None, help="What the model is told before all else."),
    max_tokens: int = typer.Option(512, "--max-tokens", "-n", min=1, help="Most tokens a turn."),
    temperature: float | None = typer.Option(
        None,
        min=0.0,
        help=f"0 takes the likeliest token; the graph's own setting, or {DEFAULTS['temperature']}.",
    ),
    top_k: int | None = typer.Option(
        None, min=0, help="Draw among this many likeliest tokens, 0 = all; the graph's own, or 0."
    ),
    top_p: float | None = typer.Option(
        None,
        help=f"Draw among the likeliest that hold this probability; the graph's own, or {DEFAULTS['top_p']}.",
    ),
    seed: int = SEED,
    stop: list[str] = STOP,
    threads: int | None = THREADS,
    kernels: str = KERNELS,
    cache: Cache = CACHE,
) -> None:
    """Talk with the model. /clear forgets the conversation, /exit or Ctrl-D ends it.

    Ctrl-C cuts an answer short.
    """
    engine = load(path, threads, kernels, cache)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {
        "max_tokens": max_tokens,
        **DEFAULTS,
        **_own_settings(engine.graph.generation, str(path)),
        **{name: value for name, value in given.items() if value is not None},
        "seed": seed,
        "stop": stop,
    }
    Conversation(engine, system, settings).run()


def _own_settings(generation: dict[str, Any], path: str) -> dict[str, Any]:
    """The graph's own way of drawing tokens. Raises GraphError for a value of another type."""
    found: dict[str, Any] = {}
    for name, kinds in (("temperature", (int, float)), ("top_k", (int,)), ("top_p", (int, float))):
        value = generation.get(name)
        if value is None:
            continue
        if type(value) not in kinds:
            raise GraphError(f"{path}: generation.{name} is {value!r}; it must be a number")
        found[name] = value
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    left_out = sorted(generation.keys() - {*found, "do_sample"})
    if left_out:
        errors.print(
            f"The model's own {', '.join(left_out)}: not known to the engine, left out.",
            style="yellow",
            highlight=False,
        )
    return found


class Conversation:
    """What was said so far; each turn computes only what is new in it."""

    def __init__(self, engine: Engine, system: str | None, settings: dict[str, Any]) -> None:
        self.engine = engine
        self.system = system
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.last: Generation | None = None
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.last = None

    def run(self) -> None:
        while True:
            try:
                said = console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            except UnicodeDecodeError as error:
                raise DataError(f"the message is not UTF-8 text ({error})") from None
            if said == "/exit":
                return
            if said == "/clear":
                self.clear()
            elif said:
                self.turn(said)

    def turn(self, said: str) -> None:
        self.messages.append({"role": "user", "content": said})
        try:
            generation = self.engine.stream(self.messages, **self.settings, after=self.last)
        except GraphError as error:
            errors.print(f"{error}\n/clear forgets the conversation.", style="yellow", markup=False)
            self.messages.pop()
            return
        self.last = generation
        try:
            print_stream(generation)
        except KeyboardInterrupt:
            console.print()
        else:
            answer = generation.completion
            print_timings(answer.timings)
            if answer.finish_reason == "context":
                errors.print("The context is full; /clear to go on.", style="yellow")
        self.messages.append({"role": "assistant", "content": generation.text})
