"""Where a decoder's control sites are, one row for each architecture, and its shape in our own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.errors import UserError

BASE_SITES = ("query", "head", "attention", "ffn")
"""The sites of the signal table (`ncn.config.signals.SITES`) that every base has."""
LONGEST_MEMORY = 2048
"""Tokens; the slowest salience head of a new controller fades over the base's context, and at most over these."""


@dataclass(frozen=True)
class Family:
    """The sites of one architecture, as module paths.

    `decoder` is a path in the model, `layers` one in the decoder, and the others are paths in a layer. Gain and gate
    act on the last module before the residual sum, since a norm after them would undo them.
    """

    decoder: str
    """The module that runs the layers and hands its keyword arguments on to them."""
    layers: str
    attention: str
    """The module that calls the attention interface. It runs before every other site of its layer."""
    projection: str
    """Joins the heads' outputs; its input is (batch, tokens, heads * head_dim)."""
    attention_output: str
    ffn_output: str


_LLAMA = Family("model", "layers", "self_attn", "self_attn.o_proj", "self_attn", "mlp")
_POST_NORM = Family(
    "model", "layers", "self_attn", "self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm"
)
FAMILIES: Mapping[str, Family] = {
    "gemma2": _POST_NORM,
    "gemma3": replace(_POST_NORM, decoder="model.language_model"),
    "gemma3_text": _POST_NORM,
    "gpt2": Family("transformer", "h", "attn", "attn.c_proj", "attn", "mlp"),
    "gpt_neox": Family("gpt_neox", "layers", "attention", "attention.dense", "attention", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _POST_NORM,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}
"""Rows by `config.model_type`. SmolLM is a Llama; `gemma3` also reads images, `gemma3_text` does not."""


@dataclass(frozen=True)
class LayerSites:
    """The modules of one layer that are hooked."""

    layer: nn.Module
    attention: nn.Module
    projection: nn.Module
    attention_output: nn.Module
    ffn_output: nn.Module


def family_of(model: PreTrainedModel) -> Family:
    """The row of the model's architecture; raises `UserError` where there is none."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        names = ", ".join(field.name for field in fields(Family))
        raise UserError(
            f"where the control sites of a {kind!r} model are is not known (known: {', '.join(FAMILIES)}); say it with "
            f"attach(model, config, family=ncn.retrofit.Family({names})), all of them module paths; "
            f"for Llama they are {', '.join(repr(getattr(_LLAMA, field.name)) for field in fields(Family))}"
        )
    return FAMILIES[kind]


def find_sites(model: PreTrainedModel, family: Family) -> tuple[nn.Module, list[LayerSites]]:
    """The decoder and the sites of its layers; raises `UserError` where one is missing."""
    decoder = _find(model, family.decoder, "the model")
    layers = _find(decoder, family.layers, f"its {family.decoder}")
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{family.decoder}.{family.layers} is not a list of layers; correct the Family")
    sites = []
    for number, layer in enumerate(layers):
        names = [field.name for field in fields(LayerSites)][1:]
        found = [_find(layer, getattr(family, name), f"layer {number}") for name in names]
        sites.append(LayerSites(layer, *found))
    return decoder, sites


def _find(root: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UserError(f"{where} has no module {path!r}, which the Family of this architecture names") from None


def core_config(config: Any, controller: ControllerConfig | None, layers: int) -> NCNConfig:
    """A transformers configuration in the words of `NCNConfig`, from which the controller is built."""
    if config.num_hidden_layers != layers:
        raise UserError(
            f"the model has {layers} layers, and its configuration says {config.num_hidden_layers}; correct the Family"
        )
    return NCNConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=layers,
        num_heads=config.num_attention_heads,
        context_length=min(config.max_position_embeddings, LONGEST_MEMORY),
        positions="learned",
        cross_documents=True,
        controller=controller,
    )
