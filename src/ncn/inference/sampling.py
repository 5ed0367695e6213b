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


class Sampler:
    """The choice of the next token of each of several rows, each with a way of sampling of its own.

    A token is drawn by inverting the cumulative distribution, in the order of ids: rows with the same number choose
    differently only as far as their distributions differ.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self.samplings = tuple(samplings)
        cold = [sampling.temperature == 0 for sampling in samplings]
        self._greedy, self._mixed = all(cold), any(cold)
        self._cold = torch.tensor(cold, device=device)
        # below 1e-30 float32 ends; a row that takes the likeliest token has any temperature
        self._temperatures = torch.tensor([max(one.temperature, 1e-30) for one in samplings], device=device)[:, None]
        self._counts = [one.top_k for one in samplings]
        shares = [one.top_p or 1.0 for one in samplings]
        self._nucleus = min(shares, default=1.0) < 1
        # the largest cumulative probability may be a little more than 1, and where there is no limit nothing is beyond
        self._shares = torch.tensor([share if share < 1 else 2.0 for share in shares], device=device)[:, None]

    def __call__(self, logits: Float[Tensor, "rows vocabulary"], positions: Sequence[int]) -> Int[Tensor, " rows"]:
        """The next token of each row, which has so many tokens before it."""
        if self._greedy:
            return logits.argmax(-1)
        cumulative = self._probabilities(logits).cumsum(-1, dtype=torch.float64)
        uniform = [one.uniform(position) for one, position in zip(self.samplings, positions, strict=True)]
        drawn = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
        places = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
        return torch.where(self._cold, logits.argmax(-1), places) if self._mixed else places

    def _probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, (rows, vocabulary); not normalised where `top_p` leaves tokens out."""
        # the largest is 0, so that no temperature is too low
        logits = (logits.float() - logits.amax(-1, keepdim=True)) / self._temperatures
        limits = [min(count or logits.shape[-1], logits.shape[-1]) for count in self._counts]
        if min(limits) < logits.shape[-1]:
            logits = _largest(logits, limits)
        probabilities = logits.softmax(-1)
        if self._nucleus:
            ordered, order = probabilities.sort(descending=True)
            kept = ordered.masked_fill_(ordered.cumsum(-1) - ordered >= self._shares, 0)
            probabilities = probabilities.scatter_(-1, order, kept)
        return probabilities


def _largest(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """The logits of each row, −∞ but for so many largest ones."""
    largest = logits.topk(max(count for count in counts if count < logits.shape[-1])).values
    last = [min(count, largest.shape[-1]) - 1 for count in counts]
    least = largest.gather(-1, torch.tensor(last, device=logits.device)[:, None])
    limited = torch.tensor([count < logits.shape[-1] for count in counts], device=logits.device)[:, None]
    return logits.masked_fill(limited & (logits < least), -torch.inf)
