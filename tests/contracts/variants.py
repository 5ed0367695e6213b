"""The configurations that the contracts run on: every option at least once, and those that interact together."""

from typing import Any

import torch
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer

VOCABULARY = 23
SEPARATOR = 0
SMALL_CONTROLLER: dict[str, Any] = {"width": 8, "hidden": 6, "pooling_heads": 2, "phasic_kernel": 3}
PUBLISHED = {
    "signals": ["gain", "precision", "ffn_gate"],
    "maps": "published",
    "precision_per": "layer",
}


def config(controller: dict[str, Any] | None = SMALL_CONTROLLER, **fields: Any) -> NCNConfig:
    """A model of 16 channels, whose controller has the given settings beside the small ones."""
    return NCNConfig.parse(
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "num_layers": 3,
            "num_heads": 2,
            "d_ff": 24,
            "context_length": 48,
            "separator_id": SEPARATOR,
            "cross_documents": True,
            "controller": None if controller is None else SMALL_CONTROLLER | controller,
        }
        | fields
    )


variants: dict[str, NCNConfig] = {
    "default": config(),
    "published": config(PUBLISHED, positions="learned"),
    "published maps, all signals": config({"maps": "published", "gain_per": "sublayer"}),
    "deeper taps": config({"taps": [0, 2]}),
    "a tap at every layer": config({"taps": [0, 1, 2], "signals": ["head_gate", "precision"]}),
    "every tap, gain per sublayer": config({"taps": "every", "gain_per": "sublayer"}, cross_documents=False),
    "as mini: pooling at the first of all taps": config(
        {"taps": "every", "gain_per": "sublayer", "pooling": "first"}, cross_documents=False
    ),
    "pooling at the first of two taps": config({"taps": [0, 2], "pooling": "first"}, positions="learned"),
    "precision per layer, gain per sublayer": config({"precision_per": "layer", "gain_per": "sublayer"}),
    "one signal": config({"signals": ["ffn_gate"]}),
    "norm film": config({"signals": ["norm_film", "gain"], "film_groups": 4, "taps": [0, 1]}),
    "residual mix": config({"signals": ["residual_mix", "gain"], "taps": [0, 2]}, positions="learned"),
    "residual mix alone, local": config({"kind": "local", "signals": ["residual_mix"]}),
    "no phasic": config({"phasic": False}),
    "phasic without memory": config({"phasic_kernel": 1, "pooling_heads": 1}),
    "swiglu, grouped queries, qk-norm": config(activation="swiglu", num_heads=4, num_kv_heads=2, qk_norm=True),
    "one key head, untied, learned positions": config(num_kv_heads=1, tie_embeddings=False, positions="learned"),
    "static": config({"kind": "static", "gain_per": "sublayer"}),
    "local": config({"kind": "local"}),
    "no controller": config(None),
    "documents": config(cross_documents=False),
    "documents, deeper taps, all options": config(
        {
            "taps": [0, 1],
            "gain_per": "sublayer",
            "phasic_kernel": 5,
            "signals": ["gain", "precision", "ffn_gate", "head_gate", "norm_film", "residual_mix"],
        },
        cross_documents=False,
        activation="swiglu",
        num_heads=4,
        num_kv_heads=2,
        qk_norm=True,
        tie_embeddings=False,
    ),
    "documents, published": config(PUBLISHED, cross_documents=False, positions="learned"),
    "documents, static": config({"kind": "static"}, cross_documents=False),
    "documents, local": config({"kind": "local"}, cross_documents=False),
    "documents, no controller": config(None, cross_documents=False, positions="learned"),
}


def awake(config: NCNConfig, dtype: torch.dtype = torch.float64) -> ModulatedTransformer:
    """A model whose weights are far from their start, so that its signals differ from neutral and between tokens."""
    model = ModulatedTransformer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model.requires_grad_(True)


def text(tokens: int, rows: int = 2) -> Tensor:
    """Token ids with document borders, some of them at the borders of the pooling's chunks, two side by side."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    for row, places in enumerate([(0, 6, 7, 16, 33), (5, 15, 17, 32)][:rows]):
        ids[row, [place for place in places if place < tokens]] = SEPARATOR
    return ids
