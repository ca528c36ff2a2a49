"""Which modules a pattern means.

A pattern is one of
- `re:EXPR`: `re.match(EXPR, name)`, from the start of the module's full name or of `<name>.weight`; end it with `$` to
  match a whole name;
- a class name, of the module's class or one of its bases (`Linear`);
- a module's full name, or its trailing part from a dot on (`lm_head`, `mlp.down_proj`), with or without `.weight`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import TargetError


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether one pattern means this module. Raises TargetError on a broken regular expression."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"target {pattern!r} is not a regular expression: {error}") from None
        return bool(expression.match(name) or expression.match(f"{name}.weight"))
    plain = pattern.removesuffix(".weight")
    return (
        name == plain
        or name.endswith(f".{plain}")
        or any(pattern == cls.__name__ for cls in type(module).__mro__ if cls is not nn.Module)
    )


def select(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a target means and no ignore pattern does, with full names, in the model's order.

    Raises TargetError when a pattern, target or ignore, matches nothing in the model.
    """
    # What is inside an adapter (of LoRA) is part of the Linear it wraps.
    inside = tuple(f"{name}." for name, m in model.named_modules() if hasattr(m, "base_layer"))
    named = [(n, module) for n, module in model.named_modules() if n and not n.startswith(inside)]
    for pattern in (*targets, *ignore):
        if not any(matches(pattern, name, module) for name, module in named):
            raise _nothing(pattern, named, "target" if pattern in targets else "ignore")
    for name, module in named:
        if any(matches(pattern, name, module) for pattern in targets) and not any(
            matches(pattern, name, module) for pattern in ignore
        ):
            yield name, module


def _nothing(pattern: str, named: list[tuple[str, nn.Module]], kind: str) -> TargetError:
    plain = re.sub(r"[^\w.]", "", pattern.removeprefix("re:")).strip(".")
    words = {name for name, _ in named} | {name.rpartition(".")[2] for name, _ in named}
    words |= {type(module).__name__ for _, module in named}
    words = {word for word in words if not word.isdigit()}
    near = difflib.get_close_matches(plain, sorted(words), n=3, cutoff=0.5)
    if not near:
        counts: dict[str, int] = {}
        for _, module in named:
            if not any(True for _ in module.children()):
                counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
        near = [f"{name} ({count}x)" for name, count in sorted(counts.items())][:5]
        return TargetError(
            f"{kind} {pattern!r} matches nothing in the model; it has {', '.join(near)}"
        )
    return TargetError(
        f"{kind} {pattern!r} matches nothing in the model; nearest: {', '.join(near)}"
    )
