"""Tokens to text as they come: never half a character, never half a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders put in place of bytes that are no character, so also of the first bytes of one.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns a growing list of token ids into pieces of text whose sum is the text of them all.

    The text of a token depends on its neighbours (spaces, bytes of one character), so a short
    window of earlier tokens is decoded with it; the window moves on whenever the text is whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # context tokens, whose text is out, then pending ones
        self._context = 0  # number of context tokens
        self._given = ""  # text of _ids that is out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[len(self._given) :]
        if whole == text and piece:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._given = self._decode(self._ids)
        else:
            self._given += piece
        return piece

    def flush(self) -> str:
        """The rest, once no token follows: an unfinished character comes as a replacement."""
        text = self._decode(self._ids)
        piece = text[len(self._given) :]
        self._given = text
        return piece


class StopStrings:
    """Passes text on up to the first stop string, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that is certainly not part of a stop string; after `found`, nothing more comes."""
        if self.found:
            return ""
        text = self._held + piece
        # The one that is complete first, so that it doesn't matter in which pieces text comes.
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
