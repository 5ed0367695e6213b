"""What every model is asked in the measurement, and what an answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from ncn.core.interface import LanguageModel
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.experiments.steering.obedience import SETTINGS
from ncn.steering.attributes import MEASURED, VALUES, read_table
from ncn.steering.decoupling import Decoupling

PROMPT_TOKENS = 8
"""Of each document, after its separator."""
DISTINCT, DISTINCT_TOKENS = (1, 2, 3), 10_000
"""Lengths of the runs of tokens whose variety is counted, and in how many tokens."""
Array = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]
Judge = tuple[LanguageModel, Tokenizer]


@dataclass(frozen=True)
class Plan:
    """What every model is asked, and where its answers are kept. See `steer` for the fields."""

    data: TokenDataset
    tokenizer: Tokenizer
    sliders: tuple[str, ...]
    prompts: int
    seeds: int
    temperature: float
    judge: Judge | None
    folder: Path
    batch_size: int
    loss_tokens: int
    longest: int
    others: float | None
    decoupled: Mapping[float, Decoupling] | None
    """By guidance."""
    quantiles: dict[str, Array] = field(init=False)
    counts: Array = field(init=False)
    documents: list[list[int]] = field(init=False)
    """The documents whose beginnings are the prompts, with their separators."""

    def __post_init__(self) -> None:
        long = [(start, end) for start, end in self.data.document_bounds() if end - start > PROMPT_TOKENS]
        if len(long) < self.prompts:
            raise UserError(f"{self.prompts} prompts were asked for, and the data has {len(long)} documents that long")
        chosen = long[:: len(long) // self.prompts][: self.prompts]
        table = read_table(self.data.folder)
        if columns := [name for name in self.sliders if name not in MEASURED]:
            raise UserError(
                f"slider {columns[0]} is a column of the data: what a story would have in it cannot be measured on the "
                f"story; what can is {', '.join(MEASURED)}"
            )
        quantiles = {name: np.array(values) for name, values in table.items() if name in MEASURED}
        object.__setattr__(self, "quantiles", quantiles)
        object.__setattr__(self, "counts", load_file(self.data.folder / VALUES)["token_counts"])
        object.__setattr__(self, "documents", [self.data.read(a, b - a).tolist() for a, b in chosen])

    @property
    def beginnings(self) -> list[list[int]]:
        """The prompts: a separator and `PROMPT_TOKENS` tokens each."""
        return [document[: PROMPT_TOKENS + 1] for document in self.documents]

    @property
    def stories(self) -> int:
        """Written for one slider of one model at one guidance with one seed."""
        return len(SETTINGS) * self.prompts

    def identity(self, model: LanguageModel, **facts: Any) -> str:
        """All that an answer depends on."""
        judge = None if self.judge is None else fingerprint(self.judge[0])
        everything = {
            "format": 3, "model": fingerprint(model), "data": self.data.fingerprint, "prompts": self.prompts,
            "temperature": self.temperature, "judge": judge, "longest": self.longest,
            "loss_tokens": self.loss_tokens, "batch_size": self.batch_size,
        }  # fmt: skip
        if self.others is not None:
            facts["others"] = self.others
        return json.dumps(everything | facts)


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 of the weights and the configuration."""
    found = hashlib.sha256(model.core_config.model_dump_json().encode())
    for tensor in model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
