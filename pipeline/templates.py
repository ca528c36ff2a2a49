"""From rows to text: a column, prompt and answer templates, or chats; and which of the text is the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..recipes import RowsConfig

Row = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Marked:
    """A text and the ranges of its characters, in order, that are answers. `ended`: a chat template ended it."""

    text: str
    answers: tuple[Span, ...]
    ended: bool = False


def texts(
    config: RowsConfig, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """One text per row, whatever makes it. Raises DataError."""
    if config.prompt is not None or config.messages is not None:
        yield from (marked.text for marked in marked_texts(config, rows, tokenizer))
        return
    column = config.text
    for row in rows:
        column = column or _only_text_column(config, row)
        require(config, row, column)
        yield str(row[column])


def marked_texts(
    config: RowsConfig, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Marked]:
    """One text per row, of templates or a chat, with its answers. Raises DataError."""
    for template in (config.prompt, config.answer):
        _check_template(config, template or "")
    for row in rows:
        if config.messages is not None:
            require(config, row, config.messages)
            yield _chat(config, row[config.messages], tokenizer)
            continue
        prompt, answer = (_fill(config, t or "", row) for t in (config.prompt, config.answer))
        if config.chat:
            turns = [{"role": "user", "content": prompt}]
            if config.answer is not None:
                turns.append({"role": "assistant", "content": answer})
            yield _chat(config, turns, tokenizer)
        else:
            yield Marked(prompt + answer, ((len(prompt), len(prompt + answer)),))


def _chat(config: RowsConfig, turns: Any, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """The turns in the model's chat template; each of the assistant's, with its end mark, is an answer."""
    fields = isinstance(turns, list) and all(isinstance(t, dict) and "role" in t for t in turns)
    if not fields or not turns:
        raise DataError(
            f"{config.dataset}: a chat is a list of {{role, content}}, got {str(turns)[:60]!r}"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{config.dataset}: this model's tokenizer has no chat template; use `prompt:` and `answer:` without `chat`"
        )

    def render(count: int, ask: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=ask)
        )

    whole = render(len(turns))
    answers = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and index:
            before, after = render(index, ask=True), render(index + 1)
            if not whole.startswith(after) or not after.startswith(before):
                raise DataError(
                    f"{config.dataset}: the model's chat template changes earlier turns when later ones follow, so the"
                    " answers can't be found in it; use `prompt:` and `answer:` without `chat`"
                )
            answers.append((len(before), len(after)))
    return Marked(whole, tuple(answers), ended=True)


def _only_text_column(config: RowsConfig, row: Row) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if len(columns) == 1:
        return columns[0]
    raise DataError(
        f"{config.dataset}: which column is the text? It has {', '.join(map(repr, row))}; set "
        "`text:` to one of them, `prompt:` and `answer:` to templates such as '{question}', or `messages:` to a "
        "column of chats"
    )


def _check_template(config: RowsConfig, template: str) -> None:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"{config.dataset}: template {template!r}: {error}") from None
    for field in fields:
        if not field.isidentifier():
            raise DataError(
                f"{config.dataset}: template {template!r}: {{{field}}} is not a column name; write "
                "{{ and }} for literal braces"
            )


def require(config: RowsConfig, row: Row, column: str) -> None:
    """DataError when the row has no such column."""
    if column not in row:
        near = get_close_matches(column, list(row), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = ", ".join(map(repr, row))
        raise DataError(f"{config.dataset}: no column {column!r}; it has {has}{hint}")


def _fill(config: RowsConfig, template: str, row: Row) -> str:
    parts = []
    for literal, field, _, _ in Formatter().parse(template):
        parts.append(literal)
        if field is not None:
            require(config, row, field)
            parts.append(str(row[field]))
    return "".join(parts)
