"""The choice of the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ncn.errors import UserError


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    if temperature == 0:
        return logits.argmax()
    logits = (logits.float() - logits.max()) / temperature  # no temperature is too low: the largest stays 0
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def check_sampling(max_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    if not temperature >= 0:
        raise UserError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")
