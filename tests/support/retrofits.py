"""Tiny random models of every architecture that a controller can be put on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ncn
from ncn.retrofit import AttachedController

VOCABULARY = 96
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "gpt_neox": _SHAPE,
    "llama": _SHAPE | _GROUPED,
    "mistral": _SHAPE | _GROUPED | {"sliding_window": 8},
    "qwen2": _SHAPE | _GROUPED,
    "qwen3": _SHAPE | _GROUPED,
    "gemma2": _SHAPE | _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _SHAPE | _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {
        "text_config": _SHAPE | _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        "mm_tokens_per_image": 4, "image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "phi3": _SHAPE | {"num_key_value_heads": 2},
    "smollm3": _SHAPE | {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    "olmo2": _SHAPE | {"num_key_value_heads": 2},
}  # fmt: skip


def base(name: str, *, attention: str | None = None, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model in evaluation mode, its weights larger than at a usual start, so that its layers matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name] | fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.to(dtype).eval()


def ids(tokens: int = 12, rows: int = 2, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def wake(handle: AttachedController, seed: int = 1) -> AttachedController:
    """Move the controller far from its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return handle


def attached(name: str, *, awake: bool = True, controller: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A model and the handle of a controller on it."""
    model = base(name, **fields)
    settings = {"width": 8, "hidden": 8, "pooling_heads": 2} | (controller or {})
    torch.manual_seed(1)
    handle = ncn.attach(model, ncn.ControllerConfig(**settings))
    return model, wake(handle) if awake else handle
