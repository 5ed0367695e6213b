"""Small models for the tests of `ncn.hf`, one for each kind of configuration."""

from typing import Any

import torch
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned positions, swiglu": {"positions": "learned", "activation": "swiglu"},
    "grouped heads, qk norm, untied": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "two taps": {"controller": {"taps": [0, 2]}},
    "two taps, one pools": {"controller": {"taps": [0, 2], "pooling": "first"}},
    "per layer, published maps": {"controller": {"precision_per": "layer", "maps": "published"}},
    "gain per sublayer, no phasic": {"controller": {"gain_per": "sublayer", "phasic": False}},
    "across documents": {"cross_documents": True},
    "across documents, learned, two taps": {
        "cross_documents": True,
        "positions": "learned",
        "controller": {"taps": [0, 1]},
    },
    "static signals": {"controller": {"kind": "static"}},
    "local gates": {"controller": {"kind": "local"}},
    "no controller": {"controller": None},
}
SEPARATOR = 3  # not zero, so that it differs from what padding is filled with


def awake(**overrides: Any) -> ModulatedTransformer:
    """A small model whose signals are far from neutral."""
    sizes = {"vocab_size": 61, "d_model": 32, "num_layers": 3, "num_heads": 4, "context_length": 48}
    torch.manual_seed(1)
    model = ModulatedTransformer(NCNConfig.parse(sizes | {"separator_id": SEPARATOR} | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.startswith("controller.") else 0.15
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def text(tokens: int, batch: int = 1) -> Tensor:
    """Token ids in which document borders occur."""
    ids = torch.randint(4, 61, (batch, tokens), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = SEPARATOR
    ids[:, tokens // 2] = SEPARATOR
    return ids


def padded_left(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of which so many last tokens are real, and the mask."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()
