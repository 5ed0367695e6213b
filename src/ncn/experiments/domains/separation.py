"""Does a controller keep two domains apart? Its signals on text of both, and what can be read from them.

Three questions, each with a control:

- how far the domains' mean signals lie apart, in standard deviations within a domain, for every layer and signal.
  Control: the same between tokens of *equal identity*, since a signal that depends on the token alone differs between
  domains as their vocabularies do;
- how often a linear read-out of the signals names the domain of held-out text. Controls: how often a linear read-out
  of the same token ids does (naive Bayes: for every id how much more often it occurs in one domain), and one of the ids
  of the last tokens up to there, since a controller reads what came before;
- both for single tokens and for stretches of consecutive tokens.

Read-outs are fitted on the tuning text and tried on the validation text, which share no documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncn.core.interface import LanguageModel
from ncn.data.dataset import TokenDataset
from ncn.inference.reading import read_windows
from ncn.steering.documents import DocumentInputs

STRETCHES = (1, 32)
"""Consecutive tokens that a domain is read from."""
RECENT = 32
"""Tokens up to a place that the second control reads."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DomainRecord:
    """Signals token by token: `tokens` (tokens,) are ids, `domain` (tokens,) is 0 or 1, and each signal is of shape
    (tokens, layers, sites), where sites are heads or sublayers, or 1."""

    tokens: NDArray[np.int64]
    domain: NDArray[np.int64]
    signals: dict[str, Array]


@torch.inference_mode()
def record_signals(
    model: LanguageModel, data: TokenDataset, names: tuple[str, str], *, with_tasks: bool
) -> DomainRecord:
    """The signals on all of `data`, whose documents belong to the tasks `names`, which the model is given or not."""
    controller = model.core_config.controller
    assert controller is not None
    given = DocumentInputs(data, controller) if with_tasks else None
    tasks = data.document_tasks(names)
    kept_tokens, kept_domains = [], []
    found: dict[str, list[torch.Tensor]] = {}
    starts = data.document_starts()
    model.eval()
    for inputs, _, real, places in read_windows(data, model.core_config.context_length, 16, model.device):
        out = model.read(inputs, output_signals=True, control=given.at(places) if given else None)
        kept_tokens.append(inputs[real].numpy())
        kept_domains.append(tasks[np.searchsorted(starts, places[real.numpy()], side="right") - 1])
        assert out.signals is not None
        for name, signal in out.signals.items():
            found.setdefault(name, []).append(signal[real])
    signals = {}
    for name, parts in found.items():
        whole = torch.cat(parts).double().numpy()
        signals[name] = whole if whole.ndim == 3 else whole[..., None]
    return DomainRecord(np.concatenate(kept_tokens), np.concatenate(kept_domains), signals)


def distances(record: DomainRecord) -> dict[str, dict[str, Any]]:
    """For every signal: the domains' means and the spread within, of each layer and site, and per layer the distance.

    {signal: {"means": (2, layers, sites), "spread": (2, layers, sites), "distance": (layers,), "same_tokens":
    (layers,)}}. A distance is |difference of means| / standard deviation within a domain, the root mean square over
    sites; a signal that does not vary has distance 0. "same_tokens" takes the difference for each token id that occurs
    in both domains, and the mean over ids, weighted by how often an id occurs in the domain where it is rarer.
    """
    first, second = (record.domain == number for number in (0, 1))
    found = {}
    for name, signal in record.signals.items():
        means = np.stack([signal[part].mean(0) for part in (first, second)])
        spread = np.stack([signal[part].std(0) for part in (first, second)])
        within = np.sqrt((spread**2).mean(0))
        scale = np.where(within > 1e-9, within, np.inf)
        found[name] = {
            "means": means.tolist(),
            "spread": spread.tolist(),
            "distance": _over_sites((means[1] - means[0]) / scale),
            "same_tokens": _over_sites(_same_tokens(record, signal) / scale),
        }
    return found


def _over_sites(values: Array) -> list[float]:
    """The root mean square over sites, for each layer."""
    found: list[float] = np.sqrt((values**2).mean(1)).tolist()
    return found


def _same_tokens(record: DomainRecord, signal: Array) -> Array:
    size = int(record.tokens.max()) + 1
    counts = np.stack([np.bincount(record.tokens[record.domain == number], minlength=size) for number in (0, 1)])
    weight = counts.min(0).astype(float)
    sums = np.zeros((2, size, *signal.shape[1:]))
    np.add.at(sums, (record.domain, record.tokens), signal)
    means = sums / np.maximum(counts, 1)[..., None, None]
    total: Array = np.tensordot(weight, means[1] - means[0], axes=1) / max(weight.sum(), 1)
    return total


def read_out(fitted: DomainRecord, tried: DomainRecord, stretch: int) -> dict[str, float]:
    """Share of the stretches of `tried` whose domain is named rightly, with read-outs fitted on `fitted`.

    "signals": least squares (ridge) on the mean of every signal over the stretch; "tokens": naive Bayes on the
    stretch's token ids; "recent": the same on the `RECENT` token ids up to each of its tokens. Each domain counts one
    half.
    """
    signals = []
    for record in (fitted, tried):
        columns = np.concatenate([signal.reshape(len(signal), -1) for signal in record.signals.values()], 1)
        signals.append(_stretches(columns, record.domain, stretch))
    (x, y), (new, truth) = signals
    centre, scale = x.mean(0), x.std(0)
    x, new = ((values - centre) / np.where(scale > 1e-9, scale, np.inf) for values in (x, new))
    sign = 2.0 * y - 1
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (sign - sign.mean()))
    size = int(max(fitted.tokens.max(), tried.tokens.max())) + 1
    counts = np.stack([np.bincount(fitted.tokens[fitted.domain == number], minlength=size) for number in (0, 1)]) + 1.0
    odds = np.diff(np.log(counts / counts.sum(1, keepdims=True)), axis=0)[0]
    own = odds[tried.tokens]
    before = np.concatenate([np.zeros(RECENT), np.cumsum(own)])
    recent = before[RECENT:] - before[:-RECENT]
    scores, _ = _stretches(np.stack([own, recent], 1), tried.domain, stretch)
    return {
        "signals": _balanced(new @ weights + sign.mean() > 0, truth),
        "tokens": _balanced(scores[:, 0] > 0, truth),
        "recent": _balanced(scores[:, 1] > 0, truth),
    }


def _stretches(values: Array, domain: NDArray[np.int64], size: int) -> tuple[Array, NDArray[np.int64]]:
    """Means over consecutive stretches of `size` tokens that lie in one domain, and which domain that is."""
    count = len(values) // size
    of = domain[: count * size].reshape(count, size)
    whole = of.min(1) == of.max(1)
    return values[: count * size].reshape(count, size, -1).mean(1)[whole], of[whole, 0]


def _balanced(said: NDArray[np.bool_], truth: NDArray[np.int64]) -> float:
    """Share named rightly, the mean of both domains'."""
    return float(np.mean([(said[truth == number] == number).mean() for number in (0, 1)]))


def measure_domains(
    model: LanguageModel, tuning: TokenDataset, validation: TokenDataset, names: tuple[str, str]
) -> dict[str, Any]:
    """Distances and read-outs of a trained model; of one that has tasks with the tasks given, and without them."""
    controller = model.core_config.controller
    assert controller is not None
    found = {}
    for label, with_tasks in (("unset", False), ("given", True)):
        if with_tasks and not controller.tasks:
            continue
        fitted, tried = (record_signals(model, data, names, with_tasks=with_tasks) for data in (tuning, validation))
        found[label] = {
            "signals": distances(tried),
            "read_out": {str(stretch): read_out(fitted, tried, stretch) for stretch in STRETCHES},
        }
    return found
