"""`${...}` in recipes: arithmetic over the recipe's args, with `min`, `max` and `round`.

An expression is parsed with `ast` and only a whitelist of nodes is evaluated here, on numbers of bounded
size: a recipe is data and can't run code, nor keep the reader busy.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from .suggest import did_you_mean

Number = int | float

MAX_LENGTH = 200
MAX_NUMBER = 2**63

# `$${` stands for a literal `${`.
_PIECE = re.compile(r"\$\$\{|\$\{(?P<body>[^}]*)\}")


class ExpressionError(ValueError):
    """An expression is malformed, names something unknown, or computes no usable number."""


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of a recipe scalar.

    A text that is one expression gives the expression's own type (an int stays an int; a bare name may also
    be a string, list or None); expressions inside a longer text are written into it.

    Raises ExpressionError.
    """
    whole = _PIECE.fullmatch(text)
    if whole and whole["body"] is not None:
        return _compute(whole["body"], names)

    def written(piece: re.Match[str]) -> str:
        if piece["body"] is None:
            return "${"
        value = _compute(piece["body"], names)
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpressionError(f"{piece[0]!r} can't stand inside a text, got {value!r}")
        return repr(value)

    result = _PIECE.sub(written, text)
    if "${" in _PIECE.sub(" ", text):
        raise ExpressionError(
            f"'${{' is never closed, got {text!r}; write '}}', or '$${{' to mean it"
        )
    return result


def escape(text: str) -> str:
    """The scalar that `evaluate` turns back into `text`."""
    return text.replace("${", "$${")


def _compute(body: str, names: Mapping[str, Any]) -> Any:
    shown = "${" + body + "}"
    if len(body) > MAX_LENGTH:
        raise ExpressionError(f"an expression is too long, got {len(body)} characters; shorten it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tokenizer warns about things that are refused below
            tree = ast.parse(body.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        message = (
            f"{shown!r} is no expression; write arithmetic over args such as ${{1 - sparsity}}"
        )
        raise ExpressionError(message) from None
    if isinstance(tree, ast.Name):
        return _name(tree.id, names, shown)
    try:
        return _Arithmetic(names, shown).number(tree)
    except ZeroDivisionError:
        raise ExpressionError(f"{shown!r} divides by zero") from None
    except (OverflowError, RecursionError):
        raise ExpressionError(f"{shown!r} is too large; make it simpler") from None


def _name(name: str, names: Mapping[str, Any], shown: str) -> Any:
    if name not in names:
        known = ", ".join(names) or "none"
        hint = did_you_mean(name, names, otherwise=f"known here: {known}")
        raise ExpressionError(f"unknown name {name!r} in {shown!r}; {hint}")
    return names[name]


def _divide(a: Number, b: Number) -> Number:
    """True division, except that a whole quotient of whole numbers stays whole."""
    if isinstance(a, int) and isinstance(b, int) and b and a % b == 0:
        return a // b
    return a / b


def _power(a: Number, b: Number) -> Number:
    if abs(b) > 64 or (isinstance(a, int) and isinstance(b, int) and b * a.bit_length() > 64):
        raise OverflowError  # known before computing it
    result = a**b
    if isinstance(result, complex):
        raise ExpressionError("a root of a negative number; make the base positive")
    return result


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], range]] = {  # and how many arguments each takes
    "min": (min, range(2, 100)),
    "max": (max, range(2, 100)),
    "round": (round, range(1, 3)),
}


class _Arithmetic:
    """Evaluates whitelisted nodes; every intermediate result is a finite number below 2^63."""

    def __init__(self, names: Mapping[str, Any], shown: str) -> None:
        self.names = names
        self.shown = shown

    def number(self, node: ast.expr) -> Number:
        value = self._value(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpressionError(f"{self.shown!r} computes with {value!r}; use numbers only")
        if not math.isfinite(value) or abs(value) > MAX_NUMBER:
            raise OverflowError
        return value

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return _name(node.id, self.names, self.shown)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](self.number(node.left), self.number(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](self.number(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, node.args)
        message = f"{self.shown!r} may hold only numbers, args, + - * / // % **, min, max and round"
        raise ExpressionError(message)

    def _call(self, name: str, arguments: list[ast.expr]) -> Any:
        if name not in _FUNCTIONS:
            hint = did_you_mean(name, _FUNCTIONS, otherwise="use min, max or round")
            raise ExpressionError(f"unknown function {name!r} in {self.shown!r}; {hint}")
        function, counts = _FUNCTIONS[name]
        if len(arguments) not in counts:
            wanted = "1 or 2" if name == "round" else "2 or more"
            raise ExpressionError(f"{name} takes {wanted} values, got {len(arguments)}")
        values = [self.number(argument) for argument in arguments]
        if name == "round" and len(values) == 2 and values[1] not in range(16):
            raise ExpressionError(f"round takes 0 to 15 digits, got {values[1]!r}")
        return function(*values)
