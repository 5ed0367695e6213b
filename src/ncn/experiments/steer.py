"""`ncn steer`: does a slider move what it is named after, how much else does it move, and what does it cost?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import Tensor

from ncn.attributes import VALUES, DocumentSliders, measure, rank, read_table
from ncn.cache import Cache
from ncn.data import TokenDataset
from ncn.errors import UserError
from ncn.loss import IGNORED
from ncn.model import ModulatedTransformer
from ncn.page import origin, table, write_page
from ncn.progress import ProgressReport
from ncn.runs import describe_environment, write_json
from ncn.tokenizer import Tokenizer
from ncn.types import ControlInputs

SETTINGS = tuple(number / 6 for number in range(7))
PROMPT_TOKENS = 8
_RESAMPLES = 1000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steering:
    """What was measured.

    Attributes:
        results: what `steer.json` holds.
    """

    results: dict[str, Any]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `steer.json`, a figure, and the page (Markdown and HTML); returns their paths."""
        from ncn.plot.steer import draw_steering

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "steer.json", self.results)
        draw_steering(self.results["sliders"], folder / "steer.png")
        page = write_page(folder / "steer.md", "What the sliders do", _page(self.results))
        return [folder / "steer.json", folder / "steer.png", *page]


def steer(
    model: ModulatedTransformer,
    tokenizer: Tokenizer,
    data: TokenDataset,
    *,
    prompts: int = 200,
    seeds: int = 3,
    temperature: float = 0.8,
    batch_size: int = 100,
    progress: bool = False,
) -> Steering:
    """Write stories with every slider at seven values, and measure them.

    Args:
        model: one with sliders.
        data: held-out documents with attributes: their first tokens are the prompts, and the loss is measured on them.
        prompts: how many documents to begin.
        seeds: stories written for each prompt and value.
        temperature: of sampling; all tokens may be drawn.
        batch_size: stories written at once.

    Raises:
        UserError: the model has no sliders, or the data has no attributes or too few documents.
    """
    names = model.config.controller.sliders if model.config.controller else ()
    if not names:
        raise UserError("this model has no sliders: train one with controller.sliders=[...]")
    known = DocumentSliders(data, names)
    quantiles = {name: np.array(values) for name, values in read_table(data.folder).items()}
    counts = load_file(data.folder / VALUES)["token_counts"]
    bounds = [*known.starts.tolist(), data.tokens]
    longest = model.config.context_length
    documents = [data.read(a, b - a).tolist() for a, b in itertools.pairwise(bounds) if b - a > PROMPT_TOKENS]
    if len(documents) < prompts:
        raise UserError(f"{prompts} prompts were asked for, and the data has {len(documents)} documents that long")
    step = len(documents) // prompts
    beginnings = torch.tensor([document[: PROMPT_TOKENS + 1] for document in documents[::step][:prompts]])
    found: dict[str, Any] = {}
    total, done, written = len(names) * len(SETTINGS) * seeds * prompts, 0, 0
    with ProgressReport("write", total, progress) as bar:
        for index, name in enumerate(names):
            ranks = np.zeros((len(quantiles), seeds, len(SETTINGS), prompts))
            distinct = np.zeros((seeds, len(SETTINGS)))
            for seed, (place, value) in itertools.product(range(seeds), enumerate(SETTINGS)):
                sliders = torch.full((1, 1, len(names)), math.nan)
                sliders[..., index] = value
                stories: list[list[int]] = []
                for first in range(0, prompts, batch_size):
                    rows = beginnings[first : first + batch_size]
                    stories += write_stories(
                        model, rows, sliders, tokenizer.separator_id, longest, temperature, seed * prompts + first
                    )
                    done += len(rows)
                    written += sum(map(len, stories[-len(rows) :]))
                    bar.update(done, written)
                measured = [measure(tokenizer.decode(ids), np.array(ids), counts) for ids in stories]
                for row, (attribute, known_ranks) in enumerate(quantiles.items()):
                    values = np.array([story[attribute] for story in measured])
                    ranks[row, seed, place] = rank(values, known_ranks)
                distinct[seed, place] = _distinct(stories, 2)
            found[name] = _describe(name, list(quantiles), ranks, distinct)
    results = {
        "format": 1,
        "settings": list(SETTINGS),
        "prompts": prompts,
        "seeds": seeds,
        "temperature": temperature,
        "sliders": found,
        "loss": held_out_losses(model, data, known),
        "environment": describe_environment(torch.device("cpu")),
    }
    return Steering(results)


@torch.inference_mode()
def write_stories(
    model: ModulatedTransformer,
    prompts: Tensor,
    sliders: Tensor,
    stop_id: int,
    longest: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """One story for each row of `prompts` (rows, tokens), which begin with a separator; the separator is left out."""
    generator = torch.Generator().manual_seed(seed)
    cache, tokens, written = Cache(capacity=longest), prompts, [prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(longest - prompts.shape[1]):
        logits = model(tokens, cache=cache, last_only=True, control=ControlInputs(sliders)).logits[:, -1].float()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        # A finished story goes on with an ordinary token, so that no new document begins in its row.
        drawn = torch.where(open_rows[:, None], drawn, prompts[:, 1:2])
        ends = drawn[:, 0] == stop_id
        open_rows &= ~ends
        written.append(torch.where(open_rows[:, None], drawn, stop_id))
        tokens = torch.where(ends[:, None], prompts[:, 1:2], drawn)
        if not open_rows.any():
            break
    rows = torch.cat(written, 1)[:, 1:].tolist()
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


@torch.inference_mode()
def held_out_losses(
    model: ModulatedTransformer, data: TokenDataset, known: DocumentSliders, tokens: int = 60_000
) -> dict[str, float]:
    """Nats a token on held-out text with its own sliders, with those of another document, and with none."""
    context = model.config.context_length
    other = np.random.Generator(np.random.PCG64(0)).permutation(len(known.ranks))
    sums, count, place = dict.fromkeys(("right", "wrong", "unset"), 0.0), 0, 0
    model.eval()
    for inputs, targets in data.windows(context, 16):
        places = place + np.arange(inputs.numel()).reshape(inputs.shape)
        documents = np.searchsorted(known.starts, np.minimum(places, data.tokens - 1), side="right") - 1
        given = {"right": known.ranks[documents], "wrong": known.ranks[other[documents]]}
        for kind in sums:
            control = ControlInputs(torch.from_numpy(given[kind])) if kind in given else None
            sums[kind] += model.token_losses(inputs, targets, control=control).double().sum().item()
        count += int((targets != IGNORED).sum())
        place += inputs.numel()
        if count >= tokens:
            break
    return {kind: total / count for kind, total in sums.items()}


def _describe(name: str, attributes: Sequence[str], ranks: Array, distinct: Array) -> dict[str, Any]:
    """Of one slider: correlation and slope with intervals over prompts, leakage, and the mean of every attribute."""
    own = ranks[attributes.index(name)]  # seeds, settings, prompts
    settings = np.broadcast_to(np.array(SETTINGS)[None, :, None], own.shape)
    generator = np.random.Generator(np.random.PCG64(0))
    draws = generator.integers(own.shape[-1], size=(_RESAMPLES, own.shape[-1]))
    slopes = np.array([_slope(settings[..., drawn], own[..., drawn]) for drawn in draws])
    by_setting = np.array([own[:, place].mean() for place in range(len(SETTINGS))])
    return {
        "spearman": spearman(settings.ravel(), own.ravel()),
        "spearman_of_means": spearman(np.array(SETTINGS), by_setting),
        "slope": {
            "value": _slope(settings, own),
            "low": float(np.quantile(slopes, 0.025)),
            "high": float(np.quantile(slopes, 0.975)),
        },
        "leakage": {
            attribute: spearman(settings.ravel(), ranks[row].ravel())
            for row, attribute in enumerate(attributes)
            if attribute != name
        },
        "means": {attribute: ranks[row].mean((0, 2)).tolist() for row, attribute in enumerate(attributes)},
        "distinct_2": distinct.mean(0).tolist(),
    }


def spearman(one: Array, other: Array) -> float:
    """Rank correlation with mean ranks for ties; 0 where one of them does not vary."""
    ranked = [_mean_ranks(values) for values in (one, other)]
    if min(values.std() for values in ranked) == 0:
        return 0.0
    return float(np.corrcoef(ranked[0], ranked[1])[0, 1])


def _mean_ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks


def _slope(x: Array, y: Array) -> float:
    centred = x - x.mean()
    return float((centred * y).sum() / (centred * centred).sum())


def _distinct(stories: Sequence[Sequence[int]], size: int) -> float:
    """Different runs of `size` tokens, as a share of all."""
    runs = [tuple(story[i : i + size]) for story in stories for i in range(len(story) - size + 1)]
    return len(set(runs)) / max(len(runs), 1)


def _page(results: Mapping[str, Any]) -> str:
    sliders, loss = results["sliders"], results["loss"]
    rows = []
    for name, found in sliders.items():
        slope = found["slope"]
        worst = max(found["leakage"], key=lambda other: abs(found["leakage"][other]), default=None)
        rows.append(
            [
                name,
                f"{found['spearman']:+.2f}",
                f"{found['spearman_of_means']:+.2f}",
                f"{slope['value']:+.2f} [{slope['low']:+.2f}, {slope['high']:+.2f}]",
                "–" if worst is None else f"{found['leakage'][worst]:+.2f} ({worst})",
                f"{min(found['distinct_2']):.2f} to {max(found['distinct_2']):.2f}",
            ]
        )
    return "\n\n".join(
        [
            f"{results['prompts']} beginnings of held-out documents ({PROMPT_TOKENS} tokens) were continued "
            f"{results['seeds']} times at each of {len(SETTINGS)} values of every slider, the others unset, at "
            f"temperature {results['temperature']:g}. What came out was measured and ranked among the documents of the "
            "training data, so that both the slider and the attribute go from 0 to 1.",
            table(
                ["slider", "Spearman, story by story", "of the means", "slope", "strongest leakage", "distinct pairs"],
                rows,
            ),
            "*Story by story* the slider competes with everything else that makes stories differ; *of the means* asks "
            "only whether the seven averages rise in order. A slope of 1 would be perfect obedience; its interval is "
            "over prompts. *Leakage* is the same correlation with another attribute, the strongest of them. *Distinct "
            "pairs* is the share of different pairs of tokens, at the least and the most varied value.",
            "![Attributes against sliders](steer.png)",
            "## What the sliders are worth as information\n\n"
            "Loss on held-out text with the sliders of each document, with those of another one, and unset:",
            table(
                ["sliders", "nats a token", "against unset"],
                [[kind, f"{loss[kind]:.4f}", f"{loss[kind] - loss['unset']:+.4f}"] for kind in loss],
            ),
            origin(results["environment"]),
        ]
    )
