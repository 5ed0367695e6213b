"""The three texts of a comparison: to train on, to tune learning rates on, and to report the result on.

The tuning split is taken off the end of the training text, in whole documents; the validation text chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ncn.data.dataset import TokenDataset, check_same_tokenizer
from ncn.data.prepare import prepare
from ncn.data.subsets import first_documents, hold_out

_GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Splits:
    """Dataset folders, opened."""

    train: TokenDataset
    tuning: TokenDataset
    validation: TokenDataset

    def facts(self) -> dict[str, Any]:
        """What identifies the texts, and the size of the one that is reported on."""
        return {
            "train": self.train.fingerprint,
            "tuning": self.tuning.fingerprint,
            "validation": self.validation.fingerprint,
            "validation_tokens": self.validation.tokens,
            "validation_text_bytes": self.validation.text_bytes,
            "validation_documents": self.validation.documents,
        }

    def measured_on(self, tokens: int, folder: Path) -> Splits:
        """The same with about the first `tokens` tokens of the validation text, whole documents, put in `folder`."""
        return replace(self, validation=first_documents(self.validation, folder, tokens))


def make_splits(folder: Path, data: str, valid: str, vocab_size: int, *, progress: bool = True) -> Splits:
    """Prepare `data` and `valid` in `folder`, and hold the tuning split out; done once, and checked from then on.

    Args:
        data, valid: a dataset folder, or a source that `ncn.prepare` reads. A source is prepared with a tokenizer of
            `vocab_size` tokens: GPT-2's where that is its size, else one that is trained on `data`.

    Raises:
        UserError: unusable data, too little of it, other data than `folder` was made from, or two tokenizers.
    """
    if Path(data).is_dir():
        whole = TokenDataset.open(data)
    else:
        gpt2 = vocab_size == _GPT2_VOCABULARY
        chosen: dict[str, Any] = {"tokenizer": "gpt2"} if gpt2 else {"vocab_size": vocab_size}
        prepare([data], folder / "source", progress=progress, **chosen)
        whole = TokenDataset.open(folder / "source")
    train, tuning = hold_out(whole, folder / "train", folder / "tuning")
    if Path(valid).is_dir():
        validation = TokenDataset.open(valid)
        check_same_tokenizer(whole, validation)
    else:
        prepare([valid], folder / "validation", tokenizer=str(whole.folder), progress=progress)
        validation = TokenDataset.open(folder / "validation")
    return Splits(train, tuning, validation)
