"""Text to tokens and back: a `tokenizers` file, and chat templates run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from ..errors import GraphError
from .graph import Graph

Message: TypeAlias = dict[str, Any]


class Tokenizer:
    """A graph's tokenizer, its special tokens, and its chat template.

    `bos` is the id to begin with or None; `eos` are the ids that end an answer.
    """

    def __init__(
        self,
        path: Path,
        bos: int | None = None,
        eos: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise GraphError(f"{path}: not a tokenizer file ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos = bos
        self.eos = tuple(eos)
        self._path = path
        self._source = chat_template

    @classmethod
    def of(cls, graph: Graph) -> Tokenizer | None:
        """The tokenizer of a graph that was read from a folder, or None if it has none."""
        about = graph.tokenizer
        if about is None or graph.folder is None:
            return None
        return cls(graph.folder / about.file, about.bos, about.eos, about.chat_template)

    @property
    def has_chat_template(self) -> bool:
        return self._source is not None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` lets the tokenizer add the tokens it begins texts with."""
        ids: list[int] = self._encode(text, special).ids
        return ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` alone, and where in it each begins and ends."""
        found = self._encode(text, special=False)
        return found.ids, found.offsets

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GraphError(f"the text is not valid Unicode ({error})") from None
        try:
            return self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # bare, as above
            raise GraphError(f"{self._path}: the tokenizer refuses this text ({error})") from None

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`, without special tokens unless asked for."""
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        except Exception as error:
            raise GraphError(f"{self._path}: the tokenizer refuses these ids ({error})") from None
        return text

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next answer.

        messages: dictionaries with `role` and `content`. Raises GraphError when there is no
        template or it refuses the messages.
        """
        if self._source is None:
            raise GraphError("the graph has no chat template; give the prompt as plain text")
        template = self._template
        try:
            text = template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                bos_token=self._special(self.bos),
                eos_token=self._special(self.eos[0] if self.eos else None),
            )
        except Exception as error:  # a template is a program: it may raise whatever it likes
            raise GraphError(f"the chat template refuses these messages: {error!r}") from None
        return self.encode(text, special=False)

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled when it is first needed: a graph whose template is broken still continues text."""
        assert self._source is not None
        return _compile(self._source, self._path)

    def _special(self, token: int | None) -> str:
        text = self._tokenizer.id_to_token(token) if token is not None else None
        return text or ""


class _Answers(jinja2.ext.Extension):
    """{% generation %}, by which templates mark answers for training; here its contents alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, path: Path) -> jinja2.Template:
    """A template that can reach nothing but its arguments (the environment of transformers)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Answers]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:  # jinja2's own, and those of Python's compiler
        raise GraphError(f"{path}: the chat template can't be parsed ({error!r})") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
