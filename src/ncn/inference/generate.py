"""A prompt in words, continued in words as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ncn.core.interface import LanguageModel
from ncn.data.tokenizer import Tokenizer
from ncn.inference.decoding import generate_tokens
from ncn.steering.values import instruction_ids


def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, instruction: str | None = None, **options: Any
) -> Iterator[str]:
    """Yield the continuation of `prompt` as text, piece by piece; a piece never ends inside a character.

    The prompt follows a separator, as every document does in training; an empty prompt begins a new document.
    `instruction` is in words, for a model that was trained with instructions; the other `options` are those of
    `generate_tokens`.
    """
    ids = [tokenizer.separator_id, *tokenizer.encode(prompt)]
    options.setdefault("max_tokens", max(model.core_config.context_length - len(ids), 1))
    options.setdefault("stop_id", tokenizer.separator_id)
    if instruction is not None:
        options["instruction"] = instruction_ids(instruction, tokenizer.encode)
    stream = TextStream(tokenizer.decode)
    for token in generate_tokens(model, ids, **options):
        if piece := stream.add(token):
            yield piece
    if rest := stream.rest():
        yield rest


class TextStream:
    """The text of tokens that come one by one, in pieces that join up to the text of all; none ends inside a character.

    Only the last piece's tokens are decoded again with a new one: a decoder may treat the first token of a text
    differently, but not the tokens after it.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._known: list[int] = []
        """The tokens of the last piece, whose text is `_text`."""
        self._text = ""
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The next piece; empty while a character's bytes, spread over several tokens, are not complete."""
        self._new.append(token)
        text = self._decode([*self._known, *self._new])
        return "" if text.endswith("\ufffd") else self._piece(text)

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._piece(self._decode([*self._known, *self._new])) if self._new else ""

    def _piece(self, text: str) -> str:
        piece = text[len(self._text) :]
        self._known, self._new = self._new, []
        self._text = self._decode(self._known)
        return piece
