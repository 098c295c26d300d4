"""From tokens to text while it is being made: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"  # what a decoder writes for the first bytes of a character


class TextStream:
    """The text of one sequence. `text` is what was handed out; `stopped` says that a stop string came up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        # Tokens are decoded behind a few earlier ones, since tokenizers treat the first of a text differently.
        self._before = self._done = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token; returns the text that is certain now."""
        self._tokens.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._before, self._done = self._done, len(self._tokens)
        return self._release(piece)

    def finish(self) -> str:
        """The rest of the text."""
        if self.stopped:
            return ""
        piece, self.stopped = self._cut(self._held + self._new_text())
        self._held = ""
        self.text += piece
        return piece

    def _new_text(self) -> str:
        """What the tokens after `_done` add."""
        known, all_of_it = (self._decode(self._tokens[self._before : end]) for end in (self._done, None))
        return all_of_it[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        waiting = self._held + piece
        certain, self.stopped = self._cut(waiting)
        self._held = ""
        if not self.stopped:
            keep = max((_overlap(waiting, stop) for stop in self._stops), default=0)
            certain, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self.text += certain
        return certain

    def _cut(self, text: str) -> tuple[str, bool]:
        """Text before the first stop string, and whether there was one."""
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        return (text[: min(places)], True) if places else (text, False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
