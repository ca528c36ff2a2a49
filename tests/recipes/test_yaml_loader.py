from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paring.recipes.dump import write_yaml
from paring.recipes.expressions import evaluate
from paring.recipes.yaml_loader import MAX_DEPTH, Document, read_yaml


def read(text: str) -> Document:
    return read_yaml(text, "r.yaml")


def only_problem(text: str) -> str:
    problems = read(text).problems
    assert len(problems) == 1, problems
    return str(problems[0])


# YAML 1.2 core schema; what YAML 1.1 makes of it (PyYAML's default) in the comment.
SCALARS: list[tuple[str, Any]] = [
    ("2:4", "2:4"),  # 124
    ("16:16:16", "16:16:16"),
    ("no", "no"),  # False
    ("yes", "yes"),
    ("on", "on"),
    ("Off", "Off"),
    ("y", "y"),
    ("1e-4", 1e-4),  # '1e-4'
    ("1E5", 1e5),
    ("-.5", -0.5),
    ("1.", 1.0),
    (".5e+2", 50.0),
    ("0o17", 15),  # '0o17'
    ("017", 17),  # 15
    ("0x1F", 31),
    ("0b11", "0b11"),  # 3
    ("1_000", "1_000"),  # 1000
    ("-0", 0),
    ("+12", 12),
    ("2020-01-01", "2020-01-01"),  # a date
    ("null", None),
    ("~", None),
    ("", None),
    ("nULL", "nULL"),
    ("True", True),
    ("FALSE", False),
    ("tRue", "tRue"),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("inf", "inf"),
    ("nan", "nan"),
    ("'5'", "5"),
    ('"true"', "true"),
    ("!!str 5", "5"),
    ("!!float 5", 5.0),
    ("=", "="),
    ("<<", "<<"),
    ("zoo:python-docs", "zoo:python-docs"),
    ("re:.*down_proj$", "re:.*down_proj$"),
    ("why?", "why?"),
]


@pytest.mark.parametrize(("written", "meant"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(written: str, meant: Any) -> None:
    for text in (f"k: {written}", f"{{k: {written}}}", f"k: {written} # comment"):
        document = read(text)
        value = document.data["k"]
        assert document.problems == []
        assert value == meant
        assert type(value) is type(meant)


def test_not_a_number() -> None:
    assert math.isnan(read("k: .nan").data["k"])


def test_a_very_long_row_of_digits_stays_text() -> None:
    digits = "9" * 5000
    assert read(f"k: {digits}").data["k"] == digits


def test_an_expression_is_one_word_everywhere() -> None:
    text = (
        "a: {b: ${min(x, y)}, c: [${x}, n${ x * 2 }m, $${x, 1]}\nd: ${x - 1} # comment\ne: $ {x: 1"
    )
    document = read(text)
    assert [problem.line for problem in document.problems] == [3]  # `$ {` is no expression
    document = read(text.rsplit("\n", 1)[0])
    assert document.problems == []
    assert document.data == {
        "a": {"b": "${min(x, y)}", "c": ["${x}", "n${ x * 2 }m", "$${x", 1]},
        "d": "${x - 1}",
    }


def test_an_open_expression_is_told_where_it_starts() -> None:
    assert only_problem("a: 1\nb: ${x\n") == (
        "r.yaml:2:4: not valid YAML: '${' is never closed; write '}' on the same line"
    )


def test_places_of_values_and_keys() -> None:
    document = read("a:\n  - b: 1\n    cd: [2, 3]\n")
    assert document.place(("a", 0, "cd", 1)) == (3, 13)
    assert document.place(("a", 0, "cd"), key=True) == (3, 5)
    assert document.place(("a", 0, "missing")) == (2, 5)
    assert document.place(("a", 0, "cd", "missing"), key=True) == (3, 5)


def test_duplicate_keys_are_refused_and_the_first_counts() -> None:
    document = read("a: 1\nb:\n  c: 2\n  c: 3\na: 4\n")
    assert [str(problem) for problem in document.problems] == [
        "r.yaml:4:3: duplicate key 'c', first at line 3; keep one",
        "r.yaml:5:1: duplicate key 'a', first at line 1; keep one",
    ]
    assert document.data == {"a": 1, "b": {"c": 2}}


def test_aliases_are_values() -> None:
    document = read("a: &x [1, {b: 2}]\nc: *x\n")
    assert document.data == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}
    assert document.problems == []


def test_a_billion_laughs_end_early() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "more than 20000 values" in only_problem("\n".join(lines))


def test_an_alias_of_itself_is_refused() -> None:
    assert "an alias contains itself" in only_problem("a: &x\n  - *x\n")
    assert "an alias contains itself" in only_problem("&x {a: {b: *x}}")


def test_deep_nesting_is_refused() -> None:
    assert "nested too deeply" in only_problem("[" * 5000 + "]" * 5000)
    assert read("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)).problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!python/object/apply:os.system ['true']", "r.yaml:1:4: tag"),
        ("a: !!int x", "r.yaml:1:4: tag !!int does not fit, got 'x'; remove the tag"),
        ("<<: {a: 1}", "r.yaml:1:1: YAML 1.2 has no merge key '<<'; write the keys out"),
        ("? [a]\n: 1", "r.yaml:1:3: a key is a list or mapping; write a plain word"),
        ("a: 1\n\tb: 2", "r.yaml:2:1: not valid YAML"),
        ("a: [1, 2", "r.yaml:1:9: not valid YAML"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1: not valid YAML"),
        ("a: *nowhere", "r.yaml:1:4: not valid YAML: found undefined alias"),
        ("a: 'x", "r.yaml:1:6: not valid YAML"),
        ("a: 1\nb: \x07", "r.yaml:2:4: not a text character"),
    ],
)
def test_bad_yaml_has_one_located_problem(text: str, problem: str) -> None:
    assert only_problem(text).startswith(problem)


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    document = read(text)
    assert all(p.line >= 1 and p.column >= 1 for p in document.problems)


@given(st.text(alphabet="ab01 :-[]{},#&*!|>'\"%@`?$\n\t~.", max_size=60))
def test_no_yaml_like_text_breaks_the_reader(text: str) -> None:
    read(text)


texts = st.text(st.characters(codec="utf-8"))
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def computed(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: computed(value) for key, value in data.items()}
    if isinstance(data, list):
        return [computed(value) for value in data]
    return evaluate(data, {}) if isinstance(data, str) else data


@given(st.dictionaries(texts, plain_data, max_size=4))
@example({"<<": 1})
@example({"${": "${"})
def test_what_is_written_reads_back(data: dict[str, Any]) -> None:
    document = read(write_yaml(data))
    assert document.problems == []
    assert computed(document.data) == data
