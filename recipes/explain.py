"""pydantic's validation errors in the words of a recipe: what is wrong, got value; what to do."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .suggest import did_you_mean, nearest
from .yaml_loader import Path


@dataclass(frozen=True)
class Mistake:
    """One mistake below the validated value; `on_key` when its place is the key, not the value."""

    path: Path
    message: str
    on_key: bool = False


def explain(
    error: ValidationError, kind: type[BaseModel], name: str, exists: Callable[[Path], bool]
) -> Iterator[Mistake]:
    """The mistakes in a value that should have become a `kind`.

    `name` is what the recipe calls that value; `exists` tells which paths below it the file really has
    (pydantic's own paths also name the branches of unions).
    """
    groups: dict[Path, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        real: Path = ()
        for part in details["loc"]:
            if exists((*real, part)):
                real = (*real, part)
        groups.setdefault(real, []).append(details)
    for path in [path for path in groups if any(_inside(other, path) for other in groups)]:
        # A mistake inside the value: that it is none of a union's other kinds is beside the point.
        groups[path] = [
            d for d in groups[path] if len(d["loc"]) == len(path) or d["type"] == "missing"
        ]
    meant = {(*path[:-1], close) for path in groups if (close := _meant(groups[path], path, kind))}
    for path, found in groups.items():
        # A misspelt key is one mistake, not also the lack of the key that was meant.
        kept = [d for d in found if d["type"] != "missing" or (*path, d["loc"][-1]) not in meant]
        yield from _explain_group(path, kept, kind, name, exists)


def _meant(found: list[ErrorDetails], path: Path, kind: type[BaseModel]) -> str | None:
    """The field that an unknown key at `path` was meant to be."""
    unknown = any(details["type"] == "extra_forbidden" for details in found)
    return nearest(str(path[-1]), _fields_at(kind, path[:-1])) if unknown else None


def _inside(other: Path, path: Path) -> bool:
    return len(other) > len(path) and other[: len(path)] == path


def _explain_group(
    path: Path,
    found: list[ErrorDetails],
    kind: type[BaseModel],
    name: str,
    exists: Callable[[Path], bool],
) -> Iterator[Mistake]:
    owner = _label(path) or name
    branches: list[ErrorDetails] = []
    for details in found:
        if details["type"] == "missing":
            message = f"{owner!r} needs {details['loc'][-1]!r}; add it"
            yield Mistake(path, message, on_key=True)
        elif details["type"] == "extra_forbidden":
            yield Mistake(path, _unknown_key(path, kind, name), on_key=True)
        else:
            branches.append(details)
    if not branches:
        return
    label = _label(path) or name
    wanted = list(dict.fromkeys(_WANTED[d["type"]] for d in branches if d["type"] in _WANTED))
    value = branches[0]["input"]
    if len(wanted) > 1 and len(wanted) == len({d["type"] for d in branches}):
        choices = " or ".join([", ".join(wanted[:-1]), wanted[-1]])
        yield Mistake(
            path, f"{label} is the wrong kind of value, got {shown(value)}; write {choices}"
        )
        return
    for message in dict.fromkeys(_message(label, details) for details in branches):
        # A model's own check ("end must come after start") is placed at the field it begins with.
        word = message.split(" ", 1)[0].strip("'")
        yield Mistake((*path, word) if exists((*path, word)) else path, message)


def shown(value: Any) -> str:
    """A value as the recipe writes it, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _label(path: Path) -> str:
    """`targets`, or `targets[2]` for an item of a list."""
    tail = len(path)
    while tail and isinstance(path[tail - 1], int):
        tail -= 1
    first = str(path[tail - 1]) if tail else ""
    return first + "".join(f"[{index}]" for index in path[tail:])


def _unknown_key(path: Path, kind: type[BaseModel], name: str) -> str:
    key = str(path[-1])
    owner = str(path[-2]) if len(path) > 1 else name
    known = _fields_at(kind, path[:-1])
    hint = did_you_mean(
        key, known, otherwise=f"known keys: {', '.join(known)}" if known else "remove it"
    )
    return f"unknown key {key!r} in {owner}; {hint}"


def _fields_at(kind: type[BaseModel], path: Path) -> list[str]:
    """Field names of the model that the value at `path` becomes; empty where that isn't one model."""
    for part in path:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(part)
        models = list(_models(field.annotation)) if field else []
        if len(models) != 1:
            return []
        kind = models[0]
    unused: frozenset[str] = getattr(kind, "unused", frozenset())
    return [name for name in kind.model_fields if name not in unused]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


_WANTED = {
    "int_type": "a whole number such as 4",
    "int_parsing": "a whole number such as 4",
    "int_from_float": "a whole number such as 4",
    "float_type": "a number such as 0.5",
    "float_parsing": "a number such as 0.5",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list such as [a, b]",
    "tuple_type": "a list such as [a, b]",
    "set_type": "a list such as [a, b]",
    "dict_type": "a mapping such as {key: value}",
    "model_type": "a mapping such as {key: value}",
    "model_attributes_type": "a mapping such as {key: value}",
    "none_required": "null",
}
_TOO = {
    "greater_than": ("too small", "more than", "gt"),
    "greater_than_equal": ("too small", "at least", "ge"),
    "less_than": ("too large", "less than", "lt"),
    "less_than_equal": ("too large", "at most", "le"),
}


def _message(label: str, details: ErrorDetails) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    got = shown(value)
    if kind in _TOO:
        how, limit, key = _TOO[kind]
        return f"{label} is {how}, got {got}; use {limit} {context[key]:g}"
    if kind in ("literal_error", "enum"):
        return _choice(label, value, str(context["expected"]))
    if kind in ("value_error", "assertion_error"):
        text = str(context["error"])
        known = isinstance(value, dict) or got in text or str(value) in text
        return text if known else f"{text}, got {got}"
    if kind in _WANTED:
        return f"{label} is the wrong kind of value, got {got}; write {_instead(kind, value)}"
    return f"{label}: {details['msg'][:1].lower()}{details['msg'][1:]}, got {got}"


def _choice(label: str, value: Any, expected: str) -> str:
    # pydantic gives the choices as one text: 'a', 'b' or 'c'
    words = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
    close = nearest(value, words) if isinstance(value, str) else None
    hint = f"did you mean {close!r}?" if close else f"use {expected}"
    return f"{label} is unknown, got {shown(value)}; {hint}"


def _instead(kind: str, value: Any) -> str:
    """What to write; exact where the slip is a known one."""
    if kind.startswith("bool") and isinstance(value, str):
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        if meant:
            return f"{meant} (YAML 1.2 has no other words for it)"
    if kind == "string_type" and isinstance(value, int | float | bool):
        return f"it in quotes: '{shown(value)}'"
    if kind == "list_type" and isinstance(value, str):
        return f"a list: [{value}]"
    if kind.startswith(("int", "float")) and isinstance(value, str) and _is_number(value):
        return f"it without quotes: {value}"
    return _WANTED[kind]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
