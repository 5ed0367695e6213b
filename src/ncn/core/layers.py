"""One transformer layer under control (equation 5)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.operations.linear import Linear
from ncn.core.operations.norm import RMSNorm
from ncn.core.operations.rotary import rotate
from ncn.core.signals.modulation import Factors, add_scaled, scale, scale_groups
from ncn.core.sliders import Adapters, adapted
from ncn.core.types import AttentionMask, Hidden


class Layer(nn.Module):
    """One transformer layer under control (equation 5)."""

    def __init__(self, config: NCNConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, index)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Hidden,
        factors: Factors,
        rotation: tuple[Tensor, Tensor] | None,
        mask: AttentionMask | None,
        cache: Cache | None,
        adapters: Adapters | None = None,
    ) -> Hidden:
        x = adapted(x, adapters, 2 * self.index)
        normed = scale_groups(self.attention_norm(x), factors.attention_norm)
        attended = self.attention(normed, factors.query, factors.head, rotation, mask, cache)
        x = add_scaled(x, attended, factors.attention)
        x = adapted(x, adapters, 2 * self.index + 1)
        return add_scaled(x, self.ffn(scale_groups(self.ffn_norm(x), factors.ffn_norm)), factors.ffn)


class Attention(nn.Module):
    """Causal self-attention; β sharpens the queries, η scales each head's output."""

    def __init__(self, config: NCNConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.qkv = Linear(config.d_model, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.output = Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x: Hidden,
        query_factor: Tensor | None,
        head_factor: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        mask: AttentionMask | None,
        cache: Cache | None,
    ) -> Hidden:
        queries, keys, values = (
            self.qkv(x).unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if query_factor is not None:
            queries = scale(queries, query_factor)
        continued = False
        if cache is not None:
            continued = cache.length > 0
            keys, values = cache.write_keys_values(self.index, keys, values)
        attended = attend(queries, keys, values, mask, causal=mask is None and not continued)
        if head_factor is not None:
            attended = scale(attended, head_factor)
        projected: Tensor = self.output(attended.flatten(2))
        return projected


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask | None, causal: bool) -> Tensor:
    """Fused attention over tensors of shape (batch, tokens, heads, head_dim)."""
    device, dtype = queries.device.type, queries.dtype
    # on CPU the backward pass is so much slower in bfloat16 that going to float32 and back costs less
    exact = device == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
    if exact:
        queries, keys, values = queries.float(), keys.float(), values.float()
    with torch.autocast(device, enabled=False) if exact else nullcontext():
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=keys.shape[2] != queries.shape[2],
        )
    return attended.transpose(1, 2).to(dtype)


class FeedForward(nn.Module):
    """GELU or SwiGLU feed-forward block without biases."""

    def __init__(self, config: NCNConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = Linear(config.d_model, config.ffn_width * (2 if self.gated else 1), bias=False)
        self.down = Linear(config.ffn_width, config.d_model, bias=False)

    def forward(self, x: Hidden) -> Hidden:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(self.up(x))
        down: Tensor = self.down(inner)
        return down
