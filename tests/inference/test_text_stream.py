"""Streamed text: pieces join up to the text of all tokens, end between characters, and cost the same all along."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ncn.data.tokenizer import Tokenizer
from ncn.inference.generate import TextStream
from ncn.models.saved import load

TEXT = "Zoë said: “日本語 is 🐉 fun!”  Two  spaces,\n\nand 👩‍👩‍👧 too — naïve café. " * 3


def byte_level() -> Tokenizer:
    return load("stories-mini")[1]


def first_space_stripped() -> RawTokenizer:
    """Of the kind of SentencePiece's: words begin with ▁, and a text's first blank is dropped."""
    raw = RawTokenizer(models.BPE(unk_token=None, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)])
    raw.train_from_iterator(["and the dog is fun and two cats said so"] * 5, trainer)
    return raw


@pytest.mark.parametrize("kind", ["bytes", "stripped"])
def test_pieces_join_up_to_the_text(kind: str) -> None:
    raw = first_space_stripped()
    ids = raw.encode(TEXT).ids if kind == "stripped" else byte_level().encode(TEXT)
    decode: Callable[[list[int]], str] = byte_level().decode
    if kind == "stripped":

        def decode(tokens: list[int]) -> str:
            return raw.decode(tokens, skip_special_tokens=False)

    whole = decode(ids)
    assert "日本語" in whole
    for end in (1, 2, 5, len(ids) // 2, len(ids)):
        stream = TextStream(decode)
        pieces = [stream.add(token) for token in ids[:end]]
        assert "".join(pieces) + stream.rest() == decode(ids[:end])
        assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_at_all_join_up() -> None:
    tokenizer, draw = byte_level(), random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(60)]
        stream = TextStream(tokenizer.decode)
        text = "".join(stream.add(token) for token in ids) + stream.rest()
        # bytes that are no characters come out as replacement characters, however many of them a decoder makes of them
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_a_token_is_decoded_with_its_neighbours_only() -> None:
    tokenizer, seen = byte_level(), 0

    def decode(tokens: list[int]) -> str:
        nonlocal seen
        seen = max(seen, len(tokens))
        return tokenizer.decode(tokens)

    stream = TextStream(decode)
    for token in tokenizer.encode(TEXT * 4):
        stream.add(token)
    assert seen < 12
