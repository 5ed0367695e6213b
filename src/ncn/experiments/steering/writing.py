"""Many stories at once, each with its own sliders."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncn.core.cache import Cache
from ncn.core.interface import LanguageModel
from ncn.core.model import ModulatedTransformer
from ncn.core.types import ControlInputs

_FEWER = 0.75
"""Finished stories leave the batch when no more than this share of it is left: leaving copies the cache."""


def one_document_a_row(model: LanguageModel) -> LanguageModel:
    """The same model, for rows that hold one document each: what keeps documents apart is then only a cost."""
    if model.core_config.cross_documents:
        return model
    twin = ModulatedTransformer(model.core_config.override(cross_documents=True))
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters())).eval().requires_grad_(False)


@torch.inference_mode()
def write_stories(
    model: LanguageModel,
    prompts: Int[Tensor, "rows tokens"],
    sliders: Float[Tensor, "rows 1 sliders"],
    uniform: Float[Tensor, "rows new"],
    *,
    stop_id: int,
    temperature: float,
    guidance: float = 1.0,
) -> list[list[int]]:
    """The story of each row of `prompts`, which begin with a separator; it and the one that ends a story are left out.

    `uniform` holds a number from 0 to 1 for every token that may be drawn, of which the next token is a function (the
    inverse of its distribution): rows with the same numbers differ only by what they are told. `guidance` is that of
    `ncn.generate`. A story that fills its row is shorter than prompt and `new` tokens by the separator alone.
    """
    model = one_document_a_row(model)
    rows, length = prompts.shape
    stories = torch.full((rows, length + uniform.shape[1]), stop_id)
    stories[:, :length] = prompts
    held, cache, tokens = torch.arange(rows), Cache(capacity=min(256, stories.shape[1])), prompts
    guided = guidance != 1
    for number in range(uniform.shape[1]):
        given = sliders[held]
        if guided:
            given, tokens = torch.cat([torch.full_like(given, math.nan), given]), torch.cat([tokens, tokens])
        logits = model.read(tokens, cache=cache, last_only=True, control=ControlInputs(given)).logits[:, -1].float()
        if guided:
            unset, steered = logits.chunk(2)
            logits = unset + guidance * (steered - unset)
        drawn = draw(logits / temperature, uniform[held, number])
        stories[held, length + number] = drawn
        going_on = (drawn != stop_id) & (stories[held, length + number - 1] != stop_id)
        # until it leaves, a finished row goes on writing separators, which no longer matter
        stories[held[~going_on], length + number] = stop_id
        tokens = drawn[:, None]
        left = int(going_on.sum())
        if not left:
            break
        if left <= _FEWER * len(held):
            kept = going_on.nonzero()[:, 0]
            cache.reorder(torch.cat([kept, kept + len(held)]) if guided else kept)
            held, tokens = held[kept], tokens[kept]
    return [row[: row.index(stop_id)] if stop_id in row else row for row in stories[:, 1:].tolist()]


def draw(logits: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token of each row at which its cumulative probability passes `uniform`."""
    cumulative = logits.softmax(-1).cumsum(-1)
    places = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return places.clamp(max=logits.shape[-1] - 1)
