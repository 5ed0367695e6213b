"""What sliders are worth as information, and what it costs to leave them unset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ncn.core.interface import LanguageModel
from ncn.core.types import ControlInputs
from ncn.data.dataset import TokenDataset
from ncn.inference.reading import read_windows
from ncn.statistics.resampling import with_interval
from ncn.steering.attributes import DocumentSliders

_RESAMPLES = 2000
Array = npt.NDArray[np.float64]


@torch.inference_mode()
def window_losses(
    model: LanguageModel, data: TokenDataset, known: DocumentSliders | None, tokens: int
) -> dict[str, Array]:
    """Nats of each window of held-out text, about `tokens` in all, with sliders unset, and, where they are `known`,
    with the right ones and with those of another document; "tokens" is how many each window has."""
    model.eval()
    found: dict[str, list[Array]] = {kind: [] for kind in ("unset", "tokens", *(("right", "wrong") if known else ()))}
    other = np.random.Generator(np.random.PCG64(0)).permutation(len(known.ranks)) if known else np.zeros(0)
    for inputs, targets, real, places in read_windows(data, model.core_config.context_length, 16, model.device, tokens):
        given: dict[str, ControlInputs | None] = {"unset": None}
        if known:
            documents = np.searchsorted(known.starts, np.minimum(places, data.tokens - 1), side="right") - 1
            given["right"] = ControlInputs(torch.from_numpy(known.ranks[documents]))
            given["wrong"] = ControlInputs(torch.from_numpy(known.ranks[other[documents]]))
        for kind, control in given.items():
            found[kind].append(model.token_losses(inputs, targets, control=control).double().sum(1).numpy())
        found["tokens"].append(real.sum(1).double().numpy())
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def mean_loss(losses: dict[str, Array], kind: str) -> float:
    """Nats a token."""
    return float(losses[kind].sum() / losses["tokens"].sum())


def difference(nats: Array, other: Array, tokens: Array) -> dict[str, float]:
    """Nats a token of one minus the other over the same windows, with a 95 % interval over windows."""
    generator = np.random.Generator(np.random.PCG64(0))
    draws = generator.integers(len(nats), size=(_RESAMPLES, len(nats)))
    resampled = (nats - other)[draws].sum(1) / tokens[draws].sum(1)
    return with_interval(float((nats - other).sum() / tokens.sum()), resampled)
