"""Which tokens are padding, from any of the forms that an attention mask comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncn.errors import UserError


def real_tokens(mask: Any, tokens: int, start: int) -> Tensor | None:
    """Which of the `tokens` at hand are real, (batch, tokens); None where the mask is None, so that all are.

    Args:
        mask: None; (batch, slots), 0 at padding; or, as `generate` makes it for caches of a fixed size, one
            (batch, 1, tokens, slots) that is True or 0.0 where a token may look, or several of those by name. A token
            that may not look at itself is padding.
        start: tokens that the cache holds already.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UserError("the controller needs attention_mask as a tensor (batch, tokens), 0 at padding")
    if mask.ndim == 2:
        return mask[:, -tokens:].bool()
    rows = torch.arange(tokens, device=mask.device)
    slots = mask.shape[-1]
    own = mask[:, 0, rows, rows + (start if start + tokens <= slots else slots - tokens)]
    return own if own.dtype == torch.bool else own == 0
