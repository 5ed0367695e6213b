"""Decoding: the model continues a prompt, one token at a time, over one cache."""

from __future__ import annotations

from collections.abc import Iterator
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
    made: list[int] = []
    shown = ""
    for token in generate_tokens(model, ids, **options):
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # the bytes of a character may be spread over several tokens
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(made)[len(shown) :]
    if rest:
        yield rest
