"""Read YAML 1.2 with the place of every value, for error messages that point.

PyYAML's parser is used only up to its node tree; scalars follow the YAML 1.2 core schema
(https://yaml.org/spec/1.2.2/#103-core-schema), so `2:4` and `no` stay strings and `1e-4` is a number.
Nothing is ever constructed from a tag. Recipes add one thing to YAML: `${...}` is one word, also inside `{}` and `[]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner, ScannerError
from yaml.tokens import ScalarToken

from ..errors import Problem

Path = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000  # after aliases are expanded, so that a "billion laughs" file ends early
MAX_DEPTH = 50

_PLAIN = "plain"  # our own tag: an unquoted scalar without a tag
_CORE = "tag:yaml.org,2002:"
_BREAKS = "\0 \t\r\n\x85\u2028\u2029"
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


@dataclass
class Document:
    """A YAML file as plain data, with the (line, column), 1-based, of every value and key."""

    source: str
    data: Any = None
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    tags: dict[Path, str] = field(default_factory=dict)  # `!Name` tags, which only old dialects use
    failed: set[Path] = field(default_factory=set)  # values already complained about
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path, key: bool = False) -> tuple[int, int]:
        """The place of the value (or the key) at `path`, else of its nearest parent."""
        while path:
            first, second = (self.keys, self.values) if key else (self.values, self.keys)
            found = first.get(path) or second.get(path)
            if found:
                return found
            path, key = path[:-1], True
        return self.values.get((), (1, 1))

    def complain(self, path: Path, message: str, key: bool = False) -> None:
        """Add a problem at the place of `path`."""
        line, column = self.place(path, key)
        self.failed.add(path)
        self.problems.append(Problem(self.source, line, column, message))


def read_yaml(text: str, source: str) -> Document:
    """Parse `text`. Mistakes are in `Document.problems`; after a syntax error `data` is None."""
    document = Document(source)
    if len(text) > MAX_CHARACTERS:
        document.complain(
            (), f"the file is too long, got {len(text)} characters; a recipe is small"
        )
        return document
    try:
        node = _Loader(text).get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        message = f"not a text character, got {error.character!r}; save the file as UTF-8 text"
        document.problems.append(Problem(source, line, column, message))
        return document
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, source))
        return document
    if node is not None:
        _Converter(document).convert(node, ())
    return document


def read_scalar(text: str) -> Any:
    """One unquoted YAML 1.2 core scalar: None, bool, int, float or the text itself."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if len(text) > 400:  # no number; also keeps int() below Python's digit limit
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float("-inf" if text[0] == "-" else "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML without its YAML 1.1 scalar types and without constructors."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _CORE + "str"
        return _CORE + ("seq" if kind is yaml.SequenceNode else "map")

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = f"values are nested too deeply; {MAX_DEPTH} levels are allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def scan_plain(self) -> ScalarToken:
        """PyYAML's rule for unquoted scalars, with `${...}` read as one word wherever it stands."""
        chunks: list[str] = []
        spaces: list[str] = []
        start = end = self.get_mark()
        indent = self.indent + 1
        while self.peek() != "#":
            length = self._word_length()
            if length == 0:
                break
            self.allow_simple_key = False
            chunks += spaces
            chunks.append(self.prefix(length))
            self.forward(length)
            end = self.get_mark()
            spaces = self.scan_plain_spaces(indent, start) or []
            if not spaces or (not self.flow_level and self.column < indent):
                break
        return ScalarToken("".join(chunks), True, start, end)

    def _word_length(self) -> int:
        length = 0
        while True:
            character = self.peek(length)
            if self.prefix(length + 3)[length:] == "$${":  # means a literal "${"
                length += 3
                continue
            if self.prefix(length + 2)[length:] == "${":
                length += self._expression_length(length)
                continue
            after = self.peek(length + 1) if character == ":" else ""
            ends_key = character == ":" and after in _BREAKS + (",[]{}" if self.flow_level else "")
            if character in _BREAKS or ends_key or (self.flow_level and character in ",[]{}"):
                return length
            length += 1

    def _expression_length(self, offset: int) -> int:
        length = 2
        while (character := self.peek(offset + length)) != "}":
            if character in "\0\r\n\x85\u2028\u2029":
                problem = "'${' is never closed; write '}' on the same line"
                raise ScannerError(None, None, problem, self.get_mark())
            length += 1
        return length + 1


class _Converter:
    """Node tree to plain data; aliases are expanded, within bounds."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0
        self.open: set[int] = set()  # nodes being converted: meeting one again is a cycle

    def convert(self, node: yaml.Node, path: Path) -> Any:
        data = self._convert(node, path)
        if not path:
            self.document.data = data
        return data

    def _convert(self, node: yaml.Node, path: Path) -> Any:
        document = self.document
        document.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        self.count += 1
        if self.count == MAX_VALUES + 1:
            document.complain(
                path, f"more than {MAX_VALUES} values with aliases expanded; use fewer"
            )
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            return None
        if id(node) in self.open:
            document.complain(path, "an alias contains itself; write the value out")
            return None
        if node.tag.startswith("!"):
            document.tags[path] = node.tag[1:]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if not node.tag.startswith("!") and node.tag not in (_CORE + "seq", _CORE + "map"):
            message = f"tag {node.tag!r} does not fit; remove it, a recipe never makes objects"
            document.complain(path, message)
        self.open.add(id(node))
        data = (
            self._mapping(node, path)
            if isinstance(node, yaml.MappingNode)
            else [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
        )
        self.open.discard(id(node))
        return data

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain_at(place, "a key is a list or mapping; write a plain word")
                continue
            key = key_node.value
            where = (*path, key)
            if key in data:
                first = self.document.keys[where][0]
                self._complain_at(place, f"duplicate key {key!r}, first at line {first}; keep one")
                continue
            if key == "<<" and key_node.style is None:  # in quotes it is a plain text
                self._complain_at(place, "YAML 1.2 has no merge key '<<'; write the keys out")
                continue
            self.document.keys[where] = place
            data[key] = None  # seen, also while its own value is converted
            data[key] = self.convert(value_node, where)
        return data

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        value, kind = node.value, node.tag.removeprefix(_CORE)
        if kind == _PLAIN:
            return read_scalar(value)
        if kind == "str" or node.tag.startswith("!"):
            return value
        typed = read_scalar(value)
        if kind == "float" and type(typed) is int:
            typed = float(typed)
        wanted = {"int": int, "float": float, "bool": bool, "null": type(None)}.get(kind)
        if wanted is None or type(typed) is not wanted:
            self.document.complain(
                path, f"tag !!{kind} does not fit, got {value!r}; remove the tag"
            )
        return typed

    def _complain_at(self, place: tuple[int, int], message: str) -> None:
        self.document.problems.append(Problem(self.document.source, *place, message))


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message = f"not valid YAML: {error.problem or error.context}"
    if "\\t" in message:
        message += "; indent with spaces"
    elif error.context and error.context_mark and error.context_mark.line + 1 != line:
        message += f" ({error.context} that starts at line {error.context_mark.line + 1})"
    return Problem(source, line, column, message)
