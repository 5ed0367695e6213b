"""The choice of the next token from its logits: a pure function of the logits and of (seed, choice, position).

So a text does not depend on what else is in its batch, nor on when it is written: the same place of the same text is
always given the same number.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncn.errors import UserError

_BITS = 48
"""Of a drawn number; few enough that its product with a sum of probabilities stays below that sum in float64."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens.
        top_p: draw from the smallest set of likeliest tokens with this much probability.
        seed: texts of one seed and choice are the same; None is a new one.
        choice: the number of a text among several with one seed.

    Raises `UserError` for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    choice: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))

    def uniform(self, position: int) -> float:
        """The number from 0 to 1 (exclusive) that decides the token with `position` tokens before it in its text."""
        drawn = hashlib.blake2b(f"{self.seed} {self.choice} {position}".encode(), digest_size=_BITS // 8).digest()
        return float(int.from_bytes(drawn) / 2**_BITS)


def choose(
    logits: Float[Tensor, "rows vocabulary"], samplings: Sequence[Sampling], positions: Sequence[int]
) -> Int[Tensor, " rows"]:
    """The next token of each row, which has so many tokens before it.

    A token is drawn by inverting the cumulative distribution, in the order of ids: rows with the same number choose
    differently only as far as their distributions differ.
    """
    greedy = logits.argmax(-1)
    if all(sampling.temperature == 0 for sampling in samplings):
        return greedy
    probabilities = _probabilities(logits, samplings)
    uniform = [sampling.uniform(position) for sampling, position in zip(samplings, positions, strict=True)]
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    cold = torch.tensor([sampling.temperature == 0 for sampling in samplings], device=logits.device)
    return torch.where(cold, greedy, places)


def _probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """What tokens are drawn from, (rows, vocabulary); not normalised where `top_p` leaves tokens out."""
    device, vocabulary = logits.device, logits.shape[-1]
    temperatures = torch.tensor([max(sampling.temperature, 1e-30) for sampling in samplings], device=device)
    # the largest logit is 0, so that no temperature is too low; below 1e-30 float32 ends
    logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / temperatures[:, None]
    counts = [min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings]
    if min(counts) < vocabulary:
        largest = logits.topk(max(count for count in counts if count < vocabulary)).values
        last = [min(count, largest.shape[-1]) - 1 for count in counts]
        least = largest.gather(-1, torch.tensor(last, device=device)[:, None])
        limited = torch.tensor([count < vocabulary for count in counts], device=device)[:, None]
        logits = logits.masked_fill(limited & (logits < least), -torch.inf)
    probabilities = logits.softmax(-1)
    shares = torch.tensor([sampling.top_p or 1.0 for sampling in samplings], device=device)
    if shares.min() < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = (ordered.cumsum(-1) - ordered >= shares[:, None]) & (shares < 1)[:, None]
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(beyond, 0))
    return probabilities
