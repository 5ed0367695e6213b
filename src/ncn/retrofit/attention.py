"""Precision on models of others: attention functions that sharpen the queries and then call the library's own.

They are registered beside the library's under names of their own, together with the mask function of the same name,
without which padding would silently be ignored. The queries that arrive have their RoPE and QK-norm behind them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ncn.core.signals.modulation import scale
from ncn.errors import UserError

CARRIER = "ncn_signals"
"""The keyword argument in which a forward pass carries its signals to every layer and attention function."""
_PREFIX = "ncn_"
_BASES = ("eager", "sdpa", "flex_attention")


def _sharpened(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        carrier = kwargs.pop(CARRIER, None)
        if carrier is not None and (factor := carrier.factors[module.layer_idx].query) is not None:
            query = scale(query, factor.transpose(1, 2))  # heads stand before tokens here
        if base == "eager":  # each architecture's own, beside its attention module
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        result: tuple[Tensor, Tensor | None] = function(module, query, *args, **kwargs)
        return result

    return attend


for _base in _BASES:
    AttentionInterface.register(_PREFIX + _base, _sharpened(_base))
    AttentionMaskInterface.register(_PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


def use_sharpened_attention(decoder: nn.Module) -> Callable[[], None]:
    """Make the decoder attend through these functions; returns what undoes it. Raises `UserError` where it cannot."""
    config: Any = decoder.config
    before = config._attn_implementation
    if before not in _BASES:
        raise UserError(
            f"the model attends by {before!r}; load it with attn_implementation= one of {', '.join(_BASES)}"
        )
    if before == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        raise UserError("reorder_and_upcast_attn bypasses the attention interface; load the model without it")
    # Of the decoder alone: a model that also reads images attends to them as before. It is a submodel with a
    # configuration of its own there, and shares the model's everywhere else.
    changed: Any = decoder
    changed.set_attn_implementation(_PREFIX + before)
    if config._attn_implementation != _PREFIX + before:
        raise UserError(f"a {config.model_type!r} model does not attend through the library's attention interface")
    return lambda: changed.set_attn_implementation(before)
