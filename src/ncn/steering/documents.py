"""What the documents of a dataset give a controller from outside: for every token, what belongs to its document."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from ncn.config.model import ControllerConfig
from ncn.core.types import ControlInputs, Instructions
from ncn.data.dataset import TokenDataset
from ncn.data.document_columns import read_instructions
from ncn.steering.attributes import DocumentSliders
from ncn.steering.document_weights import balancing_weights


class DocumentInputs:
    """The sliders, the task and the instruction of each token of a dataset: those of the document that it is in."""

    def __init__(self, dataset: TokenDataset, controller: ControllerConfig, balanced: bool = False) -> None:
        """`balanced`: documents have weights under which sliders tell nothing about other attributes.

        Raises `UserError` where the dataset lacks one of the controller's sliders, has no tasks or other ones, or no
        instructions, and where there are no such weights."""
        self.dataset, self.starts = dataset, dataset.document_starts()
        known = DocumentSliders(dataset, controller.sliders) if controller.sliders else None
        self.sliders = known.ranks if known else None
        self.weights: npt.NDArray[np.float32] | None = None
        if balanced and known:
            found = balancing_weights(known.all_ranks.astype(np.float64), controller.sliders, known.all_names)
            self.weights = found.astype(np.float32)
        self.tasks = dataset.document_tasks(controller.tasks) if controller.tasks else None
        self.instructions = DocumentInstructions(dataset) if controller.instructions else None

    @classmethod
    def of(
        cls, dataset: TokenDataset, controller: ControllerConfig | None, balanced: bool = False
    ) -> DocumentInputs | None:
        """None for a controller that is given nothing from outside, and for none."""
        given = controller and (controller.sliders or controller.tasks or controller.instructions)
        return cls(dataset, controller, balanced) if controller and given else None

    def at(self, places: npt.NDArray[np.int64]) -> ControlInputs:
        """For the tokens at `places` of the stream, (batch, tokens); beyond its end it begins anew."""
        documents = self._documents(places)
        return ControlInputs(
            sliders=None if self.sliders is None else torch.from_numpy(self.sliders[documents]),
            tasks=None if self.tasks is None else torch.from_numpy(self.tasks[documents]),
            instruction=None if self.instructions is None else self.instructions.of(documents),
        )

    def batch(
        self, seed: int, step: int, batch_size: int, context: int, dropout: float, single_dropout: float
    ) -> ControlInputs:
        """For the inputs of `TokenDataset.batch` with these arguments, of which it is a pure function, as the batch is.

        With probability `dropout` a window has nothing set, and else with probability `single_dropout` each slider, the
        task and the instruction are left out of it.
        """
        given = self.at(self._places(seed, step, batch_size, context))
        sliders = 0 if self.sliders is None else self.sliders.shape[1]
        drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, 1])))
        whole = drawn.random((batch_size, 1, 1)) < dropout
        single = drawn.random((batch_size, 1, sliders + (self.tasks is not None))) < single_dropout
        unsaid = drawn.random((batch_size, 1)) < single_dropout
        dropped = torch.from_numpy(whole | single)
        instruction = given.instruction
        if isinstance(instruction, Instructions):
            left_out = torch.from_numpy(whole[..., 0] | unsaid)
            instruction = instruction._replace(which=instruction.which.masked_fill(left_out, -1))
        return ControlInputs(
            sliders=None if given.sliders is None else given.sliders.masked_fill(dropped[..., :sliders], torch.nan),
            tasks=None if given.tasks is None else given.tasks.masked_fill(dropped[..., -1], -1),
            instruction=instruction,
        )

    def shares(
        self, seed: int, step: int, batch_size: int, context: int, given: ControlInputs
    ) -> Float[Tensor, "batch tokens"] | None:
        """How many times each target of a batch counts that is `given` this: where a slider is set as many times as
        its document weighs, elsewhere once. None where sliders are not balanced."""
        if self.weights is None or given.sliders is None:
            return None
        weights = torch.from_numpy(self.weights[self._documents(self._places(seed, step, batch_size, context))])
        return weights.masked_fill(given.sliders.isnan().all(-1), 1)

    def _places(self, seed: int, step: int, batch_size: int, context: int) -> npt.NDArray[np.int64]:
        return self.dataset.batch_starts(seed, step, batch_size, context)[:, None] + np.arange(context)

    def _documents(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The numbers of the documents that the tokens at `places` are in."""
        return np.searchsorted(self.starts, places % self.dataset.tokens, side="right") - 1


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
