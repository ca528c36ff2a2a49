"""A model's config.json, read by type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import GraphError

_REQUIRED = object()


@dataclass(frozen=True)
class Config:
    """Values of config.json; a missing key without a default, or another type, is a GraphError."""

    values: dict[str, Any]
    where: str

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; null counts as missing."""
        found = self.values.get(key)
        if found is None:
            if default is _REQUIRED:
                raise GraphError(f"{self.where}: {key!r} is missing; is this a model's config?")
            return default
        return found

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        found = self.value(key, default)
        if type(found) is not int or found < 1:
            self.refuse(key, found, "a positive integer")
        return found

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        found = self.value(key, default)
        if type(found) not in (int, float) or not (0 < found < math.inf):
            self.refuse(key, found, "a positive number")
        return float(found)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        found = self.value(key, default)
        if type(found) is not bool:
            self.refuse(key, found, "true or false")
        return found

    def section(self, key: str) -> Config | None:
        """An object inside the config, or None."""
        found = self.value(key, None)
        if found is None:
            return None
        if not isinstance(found, dict):
            self.refuse(key, found, "an object")
        return Config(found, f"{self.where}: {key}")

    def refuse(self, key: str, found: Any, expected: str) -> NoReturn:
        raise GraphError(f"{self.where}: {key} is {found!r}, the engine needs {expected}")
