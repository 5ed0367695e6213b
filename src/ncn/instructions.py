"""The instructions of a dataset's documents, as a controller is given them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ncn.column_files import read_instructions
from ncn.data import TokenDataset
from ncn.types import Instructions


class DocumentInstructions:
    """The tokens of the instruction of each document."""

    def __init__(self, dataset: TokenDataset) -> None:
        """Raises `UserError` where the dataset has no instructions."""
        self._tokens, self._ends = read_instructions(dataset)

    def __getitem__(self, document: int) -> npt.NDArray[np.int64]:
        """The token ids of one document's instruction, none where it has none; shape (words,)."""
        begin = self._ends[document - 1] if document else 0
        return self._tokens[begin : self._ends[document]].astype(np.int64)

    def of(self, documents: npt.NDArray[np.int64]) -> Instructions:
        """Those of the tokens of `documents`, (batch, tokens), which holds the number of each token's document."""
        numbers, which = np.unique(documents, return_inverse=True)
        rows = [self[number] for number in numbers.tolist()]
        ids = np.full((len(rows), max(1, *map(len, rows))), -1)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        which = which.reshape(documents.shape)
        said = (ids[:, 0] >= 0)[which]
        return Instructions(torch.from_numpy(ids), torch.from_numpy(np.where(said, which, -1)))
