"""JSON that is trusted with nothing: strict parsing, and decoding into dataclasses by their types.

A value of another type, a missing, unknown or repeated key, NaN, or nesting without end is a
`GraphError` that names the place. Field metadata `{"key": "in"}` renames a field in the JSON,
`{"key": None}` keeps it out of the JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import GraphError

REMAKE = "the file is damaged, export or download it again"
# The largest integer that every JSON reader keeps exactly.
LARGEST_INT = 2**53


def parse(data: bytes, where: str) -> Any:
    """The JSON document in `data` (UTF-8)."""
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
        # "\ud800" is JSON but half a character, which no file name or tensor name can hold.
        json.dumps(document, ensure_ascii=False).encode()
        return document
    except (ValueError, RecursionError) as error:
        raise GraphError(f"{where}: not valid JSON ({error}); {REMAKE}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is given twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def digest(document: Any, where: str) -> str:
    """SHA-256 of the one canonical text of a document: sorted keys, no spaces, ASCII."""
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise GraphError(f"{where}: nested too deeply; {REMAKE}") from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@cache
def _fields(kind: type) -> dict[str, tuple[str, Any, bool]]:
    """JSON key -> (field name, type, required) of a dataclass."""
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        key = field.metadata.get("key", field.name)
        if key is not None:
            optional = field.default is not dataclasses.MISSING
            found[key] = (field.name, hints[field.name], not optional)
    return found


def encode(value: Any) -> Any:
    """The JSON document of a dataclass. Fields that are None by default are left out when None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        document = {}
        for key, (name, _, required) in _fields(type(value)).items():
            item = getattr(value, name)
            if item is not None or required:
                document[key] = encode(item)
        return document
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed JSON, as an instance of `kind`.

    `kind` is a dataclass, a union of dataclasses told apart by their first field (a Literal),
    None | X, a Literal, bool, int, float (finite), str, tuple[X, ...], tuple[X, Y], dict[str, X],
    or Any.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_object(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return _decode_union(args, value, where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            _wrong(where, "one of " + ", ".join(map(repr, args)), value)
        return value
    if origin is dict:
        if not isinstance(value, dict):
            _wrong(where, "an object", value)
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        return _decode_tuple(args, value, where)
    return _decode_plain(kind, value, where)


def _decode_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        if not (abs(value) <= LARGEST_INT or (type(value) is float and math.isfinite(value))):
            _wrong(where, "a finite number", value)
        return float(value)
    if type(value) is not kind:
        _wrong(where, f"a value of type {kind.__name__}", value)
    if kind is int and abs(value) > LARGEST_INT:
        _wrong(where, "an integer below 2^53", value)
    return value


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong(where, "a list", value)
    if args[1:] == (...,):
        args = (args[0],) * len(value)
    if len(args) != len(value):
        _wrong(where, f"a list of {len(args)}", value)
    return tuple(decode(args[i], item, f"{where}[{i}]") for i, item in enumerate(value))


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    choices = [arg for arg in args if arg is not NoneType]
    if len(choices) < len(args) and value is None:
        return None
    if len(choices) == 1:
        return decode(choices[0], value, where)
    if not isinstance(value, dict):
        _wrong(where, "an object", value)
    tags = {}
    for choice in choices:
        (key, (_, literal, _)) = next(iter(_fields(choice).items()))
        tags[get_args(literal)[0]] = choice
    tag = value.get(key)
    if not isinstance(tag, str) or tag not in tags:
        _wrong(f"{where}.{key}", "one of " + ", ".join(map(repr, tags)), tag)
    return decode(tags[tag], value, where)


def _decode_object(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _wrong(where, "an object", value)
    fields = _fields(kind)
    if unknown := sorted(value.keys() - fields.keys()):
        raise GraphError(
            f"{where}: unknown key {unknown[0]!r}; it was written by another version of Paring "
            "or damaged, export it again"
        )
    missing = [key for key, (_, _, required) in fields.items() if required and key not in value]
    if missing:
        raise GraphError(f"{where}: {missing[0]!r} is missing; {REMAKE}")
    return kind(
        **{fields[key][0]: decode(fields[key][1], v, f"{where}.{key}") for key, v in value.items()}
    )


def _wrong(where: str, expected: str, value: Any) -> NoReturn:
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise GraphError(f"{where}: expected {expected}, got {shown}; {REMAKE}")
