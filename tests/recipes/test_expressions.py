from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paring.recipes.expressions import ExpressionError, escape, evaluate

NAMES = {
    "sparsity": 0.5,
    "epochs": 3,
    "scheme": "W8A8",
    "layers": ["a", "b"],
    "none": None,
    "on": True,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${epochs}", 3),
        ("${ epochs }", 3),
        ("${sparsity}", 0.5),
        ("${scheme}", "W8A8"),
        ("${layers}", ["a", "b"]),
        ("${none}", None),
        ("${on}", True),
        ("${epochs * 2 - 1}", 5),
        ("${1 - sparsity}", 0.5),
        ("${epochs / 3}", 1),
        ("${epochs / 2}", 1.5),
        ("${7 // 2}", 3),
        ("${-7 % 3}", 2),
        ("${2 ** 10}", 1024),
        ("${min(epochs, 2, 5)}", 2),
        ("${max(sparsity, 0.25)}", 0.5),
        ("${round(sparsity * 3)}", 2),
        ("${round(1 / 3, 2)}", 0.33),
        ("${+epochs}", 3),
        ("sparse${sparsity}-${epochs}e", "sparse0.5-3e"),
        ("${scheme}!", "W8A8!"),
        ("$${epochs}", "${epochs}"),
        ("a $${ b", "a ${ b"),
        ("$5 {x} $", "$5 {x} $"),
        ("no expression", "no expression"),
    ],
)
def test_value_and_type(text: str, value: Any) -> None:
    found = evaluate(text, NAMES)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${sparsty}", "unknown name 'sparsty' in '${sparsty}'; did you mean 'sparsity'?"),
        ("${zzz}", "known here: sparsity, epochs"),
        ("${1 / 0}", "divides by zero"),
        ("${1 % 0}", "divides by zero"),
        ("${scheme + 1}", "use numbers only"),
        ("${on + 1}", "use numbers only"),
        ("${'a' * 10}", "use numbers only"),
        ("${layers} and", "can't stand inside a text"),
        ("${none}x", "can't stand inside a text"),
        ("${rund(1.5)}", "did you mean 'round'?"),
        ("${min(1)}", "min takes 2 or more values, got 1"),
        ("${round(1.5, -9999999999)}", "0 to 15 digits"),
        ("${round(1.5, 0.5)}", "0 to 15 digits"),
        ("${}", "is no expression"),
        ("${1 +}", "is no expression"),
        ("${a", "never closed"),
        ("${(-8) ** 0.5}", "root of a negative number"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        evaluate(text, NAMES)
    assert message in str(caught.value)


HOSTILE = [
    "9**9**9",
    "9**9**9**9",
    "2**-9**9",
    "(9**20)**(9**20)",
    "1e308*10",
    "1e999",
    "0**-1",
    "9" * 190,
    "(" * 99 + ")" * 99,
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "epochs.__class__",
    "open('x')",
    "[x for x in range(9)]",
    "lambda: 1",
    "epochs if on else 2",
    "epochs == 3",
    "f'{epochs}'",
    "epochs := 3",
    "min(*layers)",
    "max(1, 2, key=round)",
    "(1).__abs__()",
    "1j * 1j",
    "...",
    "b'x'",
    "layers[0]",
    "not on",
    "~epochs",
    "1 << 99",
    "\0",
    "1 if 1else 2",
    "'\\d'",
    "x" * 201,
    "1" + "+1" * 150,
]


@pytest.mark.parametrize("body", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_expressions_are_refused_at_once(body: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ExpressionError):
        evaluate("${" + body + "}", NAMES)
    assert time.perf_counter() - began < 0.5


@given(st.text(alphabet="0123456789.+-*/%() ,epochsminaxrud_'\"", max_size=40))
def test_any_expression_ends_in_a_small_value_or_an_error(body: str) -> None:
    try:
        value = evaluate("${" + body + "}", NAMES)
    except ExpressionError:
        return
    assert value is None or isinstance(value, int | float | str | list)
    if isinstance(value, int | float):
        assert abs(value) <= 2**63


@given(st.text())
def test_escaped_text_is_itself(text: str) -> None:
    assert evaluate(escape(text), {}) == text
