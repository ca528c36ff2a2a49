"""Whether a sparse graph that drafts for a denser one decodes faster than the denser one alone, to the same tokens.

    python benchmarks/speculation.py TARGET DRAFT --data FILE [--guesses 1 2 3 4 6] [--prompts 8] [--tokens 96]

Greedy: the draft guesses some tokens, one pass of the target computes them all, and those stay that the target would
have chosen. Plain decoding and every number of guesses take turns prompt by prompt; speeds are over all prompts, ratios
medians of the prompts. Answers that differ from plain decoding's are an error: the engine gives the same bits however
a sequence is cut. `accepted` is the share of guesses that stayed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.engine import Engine
from paring.engine.state import State


@dataclass
class Tally:
    """Of one number of guesses: seconds and tokens by prompt, guesses made and kept."""

    seconds: list[float] = field(default_factory=list)
    guessed: int = 0
    accepted: int = 0


def plain(target: Engine, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    state = begin(target, prompt)
    answer = [int(state.logits.argmax())]
    began = time.perf_counter()
    while len(answer) < tokens:
        state.append(answer[-1])
        answer.append(int(state.logits.argmax()))
    return answer, time.perf_counter() - began


def drafted(
    target: Engine, draft: Engine, prompt: list[int], tokens: int, guesses: int, tally: Tally
) -> tuple[list[int], float]:
    state, small = begin(target, prompt), begin(draft, prompt)
    answer = [int(state.logits.argmax())]
    rows = np.empty((guesses + 1, target.vocabulary), np.float32)
    began = time.perf_counter()
    while len(answer) < tokens:
        known = len(prompt) + len(answer)
        small.extend(np.array([*prompt, *answer][small.length :], np.int64))
        guessed = [int(small.logits.argmax())]
        while len(guessed) < guesses:
            small.append(guessed[-1])
            guessed.append(int(small.logits.argmax()))
        part = np.array([answer[-1], *guessed], np.int64)
        target.model.forward([(state._sequence, part, "all")], rows)
        chosen = [int(row) for row in rows.argmax(axis=1)]
        right = 0
        while right < guesses and guessed[right] == chosen[right]:
            right += 1
        answer += chosen[: right + 1]
        state._sequence.truncate(known + right)
        small.rewind(np.array([*prompt, *answer], np.int64))
        tally.guessed += guesses
        tally.accepted += right
    return answer[:tokens], time.perf_counter() - began


def begin(engine: Engine, prompt: list[int]) -> State:
    state = engine.state()
    state.extend(np.array(prompt, np.int64))
    return state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a text with the prompts")
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    target = Engine.load(options.target, threads=options.threads)
    draft = Engine.load(options.draft, threads=options.threads)
    assert target.tokenizer is not None
    ids = target.tokenizer.encode(options.data.read_text(encoding="utf-8")[:400_000])
    step = (len(ids) - options.length) // options.prompts
    prompts = [ids[i * step : i * step + options.length] for i in range(options.prompts)]
    alone: list[float] = []
    tallies = {guesses: Tally() for guesses in options.guesses}
    for prompt in prompts:
        expected, seconds = plain(target, prompt, options.tokens)
        alone.append(seconds)
        for guesses, tally in tallies.items():
            found, seconds = drafted(target, draft, prompt, options.tokens, guesses, tally)
            assert found == expected, "the drafted answer differs"
            tally.seconds.append(seconds)
    count = len(prompts) * (options.tokens - 1)
    print(
        f"target {options.target}, draft {options.draft}: {count / sum(alone):.1f} tokens/s alone\n"
    )
    print("| guesses | tokens/s | x alone | accepted |\n|---|---|---|---|")
    for guesses, tally in tallies.items():
        ratio = statistics.median(a / s for a, s in zip(alone, tally.seconds, strict=True))
        share = tally.accepted / tally.guessed
        print(f"| {guesses} | {count / sum(tally.seconds):.1f} | {ratio:.2f} | {share:.0%} |")


if __name__ == "__main__":
    main()
