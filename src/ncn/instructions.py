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
        self.tokens = read_instructions(dataset)

    def of(self, documents: npt.NDArray[np.int64]) -> Instructions:
        """Those of the tokens of `documents`, (batch, tokens), which holds the number of each token's document."""
        numbers, which = np.unique(documents, return_inverse=True)
        rows = [self.tokens[number] for number in numbers]
        ids = np.full((len(rows), max(1, *map(len, rows), 1)), -1)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        said = np.array([len(tokens) > 0 for tokens in rows])
        which = which.reshape(documents.shape)
        return Instructions(torch.from_numpy(ids), torch.from_numpy(np.where(said[which], which, -1)))
