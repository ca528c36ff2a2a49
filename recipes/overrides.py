"""A recipe's `args`, and `--set name=value` over them."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Problem
from .explain import shown
from .suggest import did_you_mean
from .yaml_loader import Document, Path, read_scalar, read_yaml

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
}


def read_args(
    document: Document,
    overrides: Mapping[str, Any],
    resolve: Callable[[Any, Path, Mapping[str, Any]], Any],
) -> dict[str, Any]:
    """The recipe's args with the overrides applied; an arg may use those above it.

    Mistakes are added to the document's problems; an arg that has one keeps its name, so that no further
    mistake follows from it.
    """
    given = document.data.get("args")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        document.complain(
            ("args",), f"args is no mapping, got {shown(given)}; write {{name: value}}"
        )
        given = {}
    args: dict[str, Any] = {}
    for name, value in given.items():
        path: Path = ("args", name)
        if not name.isidentifier() or keyword.iskeyword(name):
            message = f"an arg's name must fit in ${{...}}, got {name!r}; use letters, digits and _"
            document.complain(path, message, key=True)
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in items):
            message = f"arg {name!r} is no single value or list of them, got {shown(value)}"
            document.complain(path, f"{message}; make one arg of each")
            args[name] = None
            continue
        args[name] = resolve(value, path, args)
        if name in overrides:
            args[name] = _override(document, name, overrides[name], args[name])
    for name in overrides:
        if name not in given:
            known = ", ".join(given) or "none"
            hint = did_you_mean(name, given, otherwise=f"args here: {known}")
            _complain(document, name, overrides[name], f"the recipe has no arg {name!r}; {hint}")
    return args


def _override(document: Document, name: str, value: Any, default: Any) -> Any:
    typed = _read(value, default) if isinstance(value, str) else value
    if type(default) is float and type(typed) is int:
        typed = float(typed)
    if default is not None and type(typed) is not type(default):
        kind = _KINDS[type(default)]
        message = f"arg {name!r} is {kind} ({shown(default)} in the recipe), got {shown(value)}"
        _complain(document, name, value, f"{message}; give {kind}")
        return default
    return typed


def _read(text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, list):
        parsed = read_yaml(text, "--set")
        return text if parsed.problems else parsed.data
    return read_scalar(text.strip())


def _complain(document: Document, name: str, value: Any, message: str) -> None:
    document.problems.append(Problem(f"--set {name}={value}", 0, 0, message))
