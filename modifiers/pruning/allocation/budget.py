"""Spending a budget over layers: every layer has options, each with what it saves and what it loses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ....errors import ModelError


class Option(NamedTuple):
    """One thing that a layer may become."""

    saved: float
    """What it saves: weights removed, bytes or time. Not negative."""
    lost: float
    """What it costs: the error it makes."""


class Step(NamedTuple):
    """From one option of a layer to the next on its lower hull."""

    slope: float
    """Loss per unit saved; along a layer's hull it only rises."""
    layer: str
    saved: float


def hull(options: Sequence[Option]) -> list[int]:
    """Which options lie on the lower convex hull, by what they save: the only ones worth choosing from.

    Starts at the one that loses least (of equals, that saves most). Indices into `options`.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].saved, options[i].lost))
    least = min(options[i].lost for i in order)
    start = max(i for i, at in enumerate(order) if options[at].lost == least)
    chain: list[int] = []
    for at in order[start:]:
        while len(chain) > 1 and _slope(options, chain[-2], chain[-1]) >= _slope(
            options, chain[-2], at
        ):
            chain.pop()
        if not chain or options[at].saved > options[chain[-1]].saved:
            chain.append(at)
    return chain


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    width = options[b].saved - options[a].saved
    return (options[b].lost - options[a].lost) / width if width > 0 else float("inf")


def spread(options: Mapping[str, Sequence[Option]], needed: float) -> dict[str, float]:
    """What each layer shall save, so that all together save exactly `needed` and lose least.

    Between two neighbouring options of a layer its loss is taken to be linear; then going along the steepest savings of
    all layers first (equal marginal loss) is optimal. Raises ModelError when no choice saves enough.
    """
    saved = {name: given[hull(given)[0]].saved for name, given in options.items()}
    left = needed - sum(saved.values())
    for step in _steps(options):
        if left <= 0:
            break
        part = min(step.saved, left)
        saved[step.layer] += part
        left -= part
    _enough(left, needed)
    return saved


def choose(options: Mapping[str, Sequence[Option]], needed: float) -> dict[str, int]:
    """Which option each layer shall take, so that all together save at least `needed` and lose little.

    As `spread`, but in whole steps; those that turn out not to be needed, because the last one saved more than was
    missing, are taken back, the most costly first. Raises ModelError when no choice saves enough.
    """
    chains = {name: hull(given) for name, given in options.items()}
    place = dict.fromkeys(chains, 0)
    left = needed - sum(options[name][chain[0]].saved for name, chain in chains.items())
    taken: list[Step] = []
    for step in _steps(options):
        if left <= 0:
            break
        place[step.layer] += 1
        left -= step.saved
        taken.append(step)
    _enough(left, needed)
    for step in reversed(taken):
        top = place[step.layer]
        chain = chains[step.layer]
        last = options[step.layer][chain[top]].saved - options[step.layer][chain[top - 1]].saved
        if top > 0 and last == step.saved and left + step.saved <= 0:
            place[step.layer] -= 1
            left += step.saved
    return {name: chain[place[name]] for name, chain in chains.items()}


def level(
    wanted: Mapping[str, float], sizes: Mapping[str, int], mean: float, most: float = 0.99
) -> dict[str, float]:
    """The values `wanted`, all shifted by the same and cut to [0, most], so that their mean weighted by size is `mean`.

    Bisection: the mean only rises with the shift.
    """
    total, most = sum(sizes.values()), max(most, mean)
    low, high = -max(wanted.values()), most - min(wanted.values())

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(value + by, 0.0), most) for name, value in wanted.items()}

    for _ in range(60):
        middle = (low + high) / 2
        found = shifted(middle)
        if sum(found[name] * sizes[name] for name in found) < mean * total:
            low = middle
        else:
            high = middle
    return shifted(high)


def _steps(options: Mapping[str, Sequence[Option]]) -> list[Step]:
    """All layers' steps along their hulls, the cheapest first; stable, so the same input gives the same choice."""
    steps = []
    for name, given in options.items():
        chain = hull(given)
        for a, b in itertools.pairwise(chain):
            steps.append(Step(_slope(given, a, b), name, given[b].saved - given[a].saved))
    return sorted(steps, key=lambda step: step.slope)


def _enough(left: float, needed: float) -> None:
    if left > 1e-9 * max(1.0, needed):
        raise ModelError(
            f"no choice saves enough: {left / needed:.1%} of what is asked for is missing; ask for less or allow more"
        )
