"""A resolved recipe as YAML."""

from __future__ import annotations

from typing import Any

import yaml

from ..modifiers.base import Modifier
from .expressions import escape
from .schema import Recipe
from .yaml_loader import read_scalar


def dump(recipe: Recipe) -> str:
    """YAML that loads to an equal recipe. Only what was given is written; defaults are left out."""
    data = recipe.model_dump(mode="json", exclude_unset=True, exclude={"stages"})
    data = {"version": recipe.version, **data, "stages": []}
    for stage in recipe.stages:
        entry = stage.model_dump(mode="json", exclude_unset=True, exclude={"modifiers"})
        if stage.modifiers:
            entry["modifiers"] = [
                {modifier.key(): given_fields(modifier)} for modifier in stage.modifiers
            ]
        data["stages"].append(entry)
    order = [key for key in Recipe.model_fields if key in data]
    return write_yaml({key: data[key] for key in order})


def given_fields(modifier: Modifier) -> dict[str, Any]:
    """The fields that were set: its own first, then those that every modifier has."""
    given = modifier.model_dump(mode="json", exclude_unset=True)
    return dict(sorted(given.items(), key=lambda item: item[0] in Modifier.model_fields))


def write_yaml(data: Any, resolved: bool = True) -> str:
    """YAML 1.2 that reads back as `data`; innermost collections on one line.

    Resolved: `evaluate` turns each text back into itself. Otherwise a `${...}` in `data` stays an expression.
    """
    return yaml.dump(
        _escaped(data) if resolved else data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**9,
        default_flow_style=None,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as something else; never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        odd = "${" in text or any(mark in text for mark in "\x85\u2028\u2029")
        style = '"' if odd or not isinstance(read_scalar(text), str) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _escaped(data: Any) -> Any:
    """Texts such that `evaluate` turns each back into itself; keys are never evaluated."""
    if isinstance(data, dict):
        return {key: _escaped(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_escaped(value) for value in data]
    return escape(data) if isinstance(data, str) else data
