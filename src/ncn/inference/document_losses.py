"""The loss of each document of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save

from ncn.core.interface import LanguageModel
from ncn.data.dataset import TokenDataset
from ncn.errors import UserError
from ncn.inference.reading import check_vocabulary, evaluating, perplexity, read_windows, validation_facts
from ncn.machine.files import write_atomically
from ncn.steering.documents import DocumentInputs


@dataclass(frozen=True)
class DocumentLosses:
    """Loss of each document of a text, all of shape (documents,): summed `nats`, the `tokens` that they are summed
    over, and the UTF-8 `bytes` of its text. A document's last token is the separator that ends it."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats a token over all documents."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Over all documents."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    def validation_facts(self, dataset: TokenDataset) -> dict[str, Any]:
        """What a training run logs of it, also for each task of the dataset where it has tasks."""
        by_task = {
            name: validation_facts(part.loss, part.bits_per_byte) for name, part in self.by_task(dataset).items()
        }
        return {**validation_facts(self.loss, self.bits_per_byte), **({"validation_tasks": by_task} if by_task else {})}

    def of(self, chosen: npt.NDArray[np.bool_]) -> DocumentLosses:
        """Those of some documents; `chosen` is of shape (documents,)."""
        return DocumentLosses(self.nats[chosen], self.tokens[chosen], self.bytes[chosen])

    def by_task(self, dataset: TokenDataset) -> dict[str, DocumentLosses]:
        """The losses of the documents of each of the dataset's tasks, by the task's name; empty without tasks."""
        places = dataset.document_tasks(dataset.tasks) if dataset.tasks else np.zeros(0, np.int64)
        return {name: self.of(places == number) for number, name in enumerate(dataset.tasks)}

    def save(self, path: Path) -> None:
        write_atomically(path, save(vars(self)))

    @classmethod
    def load(cls, path: Path) -> DocumentLosses:
        """Raises `UserError` where there is no such file."""
        if not path.is_file():
            raise UserError(f"{path} is missing: the run was not validated, or has not finished")
        return cls(**load_file(path))


@torch.inference_mode()
def document_losses(
    model: LanguageModel,
    dataset: TokenDataset,
    *,
    context: int | None = None,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    document_inputs: DocumentInputs | None = None,
) -> DocumentLosses:
    """The loss of each document, in the windows of `evaluate`, to whose result the documents add up. `document_inputs`
    is what the dataset's documents give the controller.

    The bytes are those of the decoded tokens. Where a tokenizer does not give back the very text, they are scaled so
    that they still add up to the dataset's.
    """
    check_vocabulary(model, dataset)
    found = []
    context = context or model.core_config.context_length
    with evaluating(model, autocast) as device:
        for inputs, targets, real, places in read_windows(dataset, context, batch_size, device):
            control = document_inputs.at(places).to(device) if document_inputs else None
            losses = model.token_losses(inputs, targets, control=control).cpu()
            found.append(losses[real].double().numpy())
    return by_document(np.concatenate(found), dataset)


def by_document(losses: npt.NDArray[np.float64], dataset: TokenDataset) -> DocumentLosses:
    """The losses of a dataset's tokens in order, its first one left out, added up for each document."""
    bounds = dataset.document_bounds()
    starts, ends = [start for start, _ in bounds], np.cumsum(dataset.document_bytes(bounds))
    exact = ends if ends[-1] == dataset.text_bytes else np.rint(ends * (dataset.text_bytes / ends[-1]))
    return DocumentLosses(
        nats=np.add.reduceat(losses, starts),
        tokens=np.diff(np.append(starts, dataset.tokens - 1)),
        bytes=np.diff(exact, prepend=0).astype(np.int64),
    )
