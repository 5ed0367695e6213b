"""Text to token ids and back: a thin layer over the `tokenizers` library.

Text is only ever text: a string such as `<|endoftext|>` inside a document is encoded like any other characters and
never becomes the separator id, which the code that lays out documents puts in by itself.
"""

import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ncn.errors import UserError
from ncn.machine.files import ASSETS, write_atomically
from ncn.machine.hub import from_hub, is_hub_name

SEPARATOR = "<|endoftext|>"
"""The token that begins every document, and the line that separates documents in a plain text file."""

MINIMUM_VOCAB_SIZE = 257
"""256 bytes and the separator: the smallest byte-level vocabulary."""

HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What is fetched of a repository for its tokenizer."""

_BUNDLED = {"gpt2": ASSETS / "gpt2_tokenizer.json.xz"}
_USUAL_END_TOKENS = ("</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]")


class Tokenizer:
    """A tokenizer with a separator token, made by `Tokenizer.load` or `Tokenizer.train`.

    Args:
        definition: the content of a `tokenizer.json`. Truncation, padding and dropout are switched off in it, since
            each of them would silently change what a text is encoded to.
        end_token: the separator where the vocabulary has no `<|endoftext|>`.
        name: what to call the tokenizer in an error message.

    Raises:
        UserError: the definition is not valid, or the vocabulary has no token that can separate documents.
    """

    def __init__(self, definition: dict[str, Any], end_token: str | None = None, name: str = "the tokenizer") -> None:
        definition = definition | {"truncation": None, "padding": None}
        if isinstance(definition.get("model"), dict) and "dropout" in definition["model"]:
            definition["model"] = definition["model"] | {"dropout": None}
        self._byte_level = "ByteLevel" in json.dumps([definition.get("decoder"), definition.get("pre_tokenizer")])
        self._canonical = json.dumps(definition, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        try:
            self.backend = tokenizers.Tokenizer.from_str(self._canonical)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name} is not a tokenizer.json of the tokenizers library: {_first_line(error)}") from None
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        candidates = [SEPARATOR, end_token, *_USUAL_END_TOKENS]
        separator = next((token for token in candidates if token in vocabulary), None)
        if separator is None:
            raise UserError(
                f"{name} has no token to separate documents: add {SEPARATOR} to its vocabulary, "
                "or name its eos_token in a tokenizer_config.json beside it"
            )
        self.separator: str = separator
        self.separator_id: int = vocabulary[separator]

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Read a tokenizer.

        Args:
            source: "gpt2" (ships with the package), a `tokenizer.json` or `tokenizer.json.xz`, a folder that holds
                one (a saved Hugging Face tokenizer, a prepared dataset, a saved model), or else the name of a
                repository on the Hugging Face hub ("owner/name") that does.

        Raises:
            UserError: there is no such file, it is not a tokenizer, or it has no separator.
        """
        path = _BUNDLED.get(str(source), Path(source))
        if is_hub_name(str(source)) and not path.exists():
            path = from_hub(str(source), HUB_FILES)
            if not (path / "tokenizer.json").is_file():
                raise UserError(
                    f"{source} holds no tokenizer.json on the Hugging Face hub, or it was not kept when there was a "
                    "network: save a fast tokenizer with save_pretrained and name its folder"
                )
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "tokenizer.json.xz") if (path / name).is_file()]
            if not found:
                raise UserError(f"{path} holds no tokenizer.json: save a fast tokenizer there with save_pretrained")
            path = found[0]
        if not path.is_file():
            raise UserError(
                f'no tokenizer at {source}: give "gpt2", a tokenizer.json, a folder that holds one, or the OWNER/NAME '
                "of one on the Hugging Face hub"
            )
        try:
            content = path.read_bytes()
            definition = json.loads(lzma.decompress(content) if path.suffix == ".xz" else content)
        except (lzma.LZMAError, ValueError) as error:
            raise UserError(f"{path} is not a tokenizer.json: {_first_line(error)}") from None
        if not isinstance(definition, dict):
            raise UserError(f"{path} is not a tokenizer.json: expected an object, found {type(definition).__name__}")
        return cls(definition, end_token=_configured_end_token(path.parent), name=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level byte-pair encoding, whose token 0 is the separator. The same texts give the same
        tokenizer.

        Args:
            texts: documents.
            vocab_size: tokens to learn, the separator and the 256 bytes included. Few or short texts may offer fewer
                pairs than that; `Tokenizer.vocab_size` then says what there is.

        Raises:
            UserError: `vocab_size` is below 257.
        """
        if vocab_size < MINIMUM_VOCAB_SIZE:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and the separator need {MINIMUM_VOCAB_SIZE}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        # For other users of the file: a text begins with a separator, as every document does in training.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A $B", special_tokens=[(SEPARATOR, 0)]
        )
        return cls(json.loads(backend.to_str()))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` that tells transformers which token ends a text and
        pads it."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.separator,
            "eos_token": self.separator,
            "pad_token": self.separator,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_atomically(folder / "tokenizer.json", self._canonical)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition in canonical JSON (sorted keys, no spaces), as hexadecimal digits."""
        return hashlib.sha256(self._canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with no special tokens put in."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of several texts; the library spreads the work over the cores."""
        # encode_batch_fast leaves out character offsets, which nothing here needs.
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out by name; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def token_labels(self, ids: Sequence[int]) -> list[str]:
        r"""One readable string for each token id.

        A space stays a space; control characters and bytes that are only a part of a UTF-8 character are written as
        escapes (`\n`, `\xf0`), so that a label always fits on one line.
        """
        special = {number for number, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return [self._label(number, number in special) for number in ids]

    def _label(self, number: int, special: bool) -> str:
        token: str | None = self.backend.id_to_token(number)
        if token is None:
            return f"<unknown {number}>"
        if special:
            return token
        if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in token):
            content = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's fallback to bytes
            content = bytes([int(token[3:5], 16)])
        else:
            content = token.replace("▁", " ").encode()
        text = content.decode("utf-8", errors="backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: printable Latin-1 stands for itself, the rest follows
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _configured_end_token(folder: Path) -> str | None:
    """The eos_token that a Hugging Face tokenizer folder names, if it does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return content
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
