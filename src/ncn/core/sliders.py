"""Sliders beside the controller: in the embeddings, and as adapters in the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.controller.inputs import known_values
from ncn.core.types import Hidden, Sliders


class SliderEmbedding(nn.Module):
    """What sliders in the controller are compared with: a linear map of them to the width of the embeddings, added to
    those of all tokens, or, as a prefix token, to that of the token that begins a document, which the attention of
    all the others sees."""

    def __init__(self, d_model: int, count: int, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = nn.Parameter(torch.empty(d_model, 2 * count))  # the model initialises it with its embeddings

    @classmethod
    def of(cls, config: NCNConfig) -> SliderEmbedding | None:
        """The one that the configuration asks for; None where sliders enter the controller, or there are none."""
        controller = config.controller
        if controller is None or not controller.sliders or controller.sliders_enter not in ("prefix", "embedding"):
            return None
        return cls(config.d_model, len(controller.sliders), controller.sliders_enter == "prefix")

    def forward(self, embeddings: Hidden, sliders: Sliders, begins: Bool[Tensor, "#batch tokens"]) -> Hidden:
        """The embeddings with those of the sliders. `begins` is true where a document begins."""
        added = nn.functional.linear(known_values(sliders.to(self.weight.dtype)), self.weight)
        return embeddings + (added * begins.unsqueeze(-1) if self.prefix else added)


class SliderAdapters(nn.Module):
    """Sliders in the layers. At every place, the input of each sublayer and what the last norm reads, they add

        W s + U (φ(V x̂ + C s) − φ(V x̂))

    to the residual stream x. s are the sliders' known values, x̂ is x normalised, φ is GELU. W gives each slider a
    direction of its own; U, V and C are an adapter of `rank` units (Houlsby et al., Parameter-efficient transfer
    learning for NLP, 2019), of which only that remains which the sliders change in it. So what is unset adds exactly
    nothing; and as W and U begin at zero, so does what is set.
    """

    def __init__(self, d_model: int, places: int, count: int, rank: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.direction = nn.Parameter(torch.empty(places, d_model, 2 * count))
        self.read = nn.Parameter(torch.empty(places, rank, d_model))
        self.turn = nn.Parameter(torch.empty(places, rank, 2 * count))
        self.write = nn.Parameter(torch.empty(places, d_model, rank))

    @classmethod
    def of(cls, config: NCNConfig) -> SliderAdapters | None:
        """Those that the configuration asks for; None where sliders enter elsewhere, or there are none."""
        controller = config.controller
        if controller is None or not controller.sliders or controller.sliders_enter != "layers":
            return None
        places = 2 * config.num_layers + 1
        return cls(config.d_model, places, len(controller.sliders), controller.slider_rank, config.norm_eps)

    def reset_parameters(self) -> None:
        for matrices in (self.direction, self.write):
            nn.init.zeros_(matrices)
        for matrices in (self.read, self.turn):
            nn.init.normal_(matrices, std=matrices.shape[-1] ** -0.5)

    def forward(self, sliders: Sliders) -> Adapters:
        """What the places need. The products are left to them: all at once they would be as large as the activations
        of all layers."""
        known = known_values(sliders.to(self.direction.dtype))
        return Adapters(known, self.direction, self.read, self.turn, self.write, self.eps)


class Adapters(NamedTuple):
    """Known values of sliders, and the parameters of `SliderAdapters` for all places."""

    known: Float[Tensor, "#batch #tokens numbers"]
    direction: Float[Tensor, "places width numbers"]
    read: Float[Tensor, "places rank width"]
    turn: Float[Tensor, "places rank numbers"]
    write: Float[Tensor, "places width rank"]
    eps: float


def adapted(x: Hidden, adapters: Adapters | None, place: int) -> Hidden:
    """x with what sliders add at a place; None is nothing."""
    if adapters is None:
        return x
    known, direction, read, turn, write, eps = adapters
    linear, gelu = nn.functional.linear, nn.functional.gelu
    units = linear(nn.functional.rms_norm(x, x.shape[-1:], eps=eps), read[place])
    changed = gelu(units + linear(known, turn[place])) - gelu(units)
    return x + linear(known, direction[place]) + linear(changed, write[place])
