"""Controllers on disk: `controller.safetensors` and `controller.json`, a few hundred KB beside the base they fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ncn.config.model import CONTROLLER, ControllerConfig, NCNConfig
from ncn.errors import UserError
from ncn.machine.files import read_json, write_atomically
from ncn.machine.tensors import write_tensors
from ncn.retrofit.families import LONGEST_MEMORY, core_config

WEIGHTS = "controller.safetensors"
_CHANGEABLE = {
    "transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "use_cache", "architectures",
    "quantization_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation",
}  # fmt: skip
WORDS = {
    "model_type": "architecture", "hidden_size": "width", "num_hidden_layers": "number of layers",
    "num_attention_heads": "number of attention heads", "vocab_size": "vocabulary size",
}  # fmt: skip


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What a controller must find again: architecture and widths, and a hash of all that the configuration decides."""
    config: Any = model.config.get_text_config()
    settings = {name: value for name, value in config.to_dict().items() if name not in _CHANGEABLE}
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        **{name: getattr(config, name) for name in WORDS},
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def save_controller(
    controller: nn.Module, config: ControllerConfig, base: PreTrainedModel, folder: Path, base_name: str | None = None
) -> None:
    """Write a controller of the form `config` on `base`; each file under a temporary name first. The configuration
    comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, controller.state_dict())
    content = {
        "format": 1,
        "controller": config.model_dump(mode="json"),
        "base": describe_base(base),
    } | ({"base_name": base_name} if base_name else {})
    write_atomically(folder / CONTROLLER, json.dumps(content, indent=2) + "\n")


def read_controller(folder: Path) -> tuple[NCNConfig, str]:
    """The form of a saved controller on its base, and where that base is, as far as it was written down; neither the
    weights nor the base are read. Raises `UserError` for files that describe no controller."""
    content = read_json(folder / CONTROLLER)
    try:
        base = content["base"]
        # how far the base reads is not written down
        config = SimpleNamespace(**{name: base[name] for name in WORDS}, max_position_embeddings=LONGEST_MEMORY)
        shape = core_config(config, ControllerConfig(**content["controller"]), base["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder / CONTROLLER} describes no controller on a base: {reason}") from None
    return shape, content.get("base_name") or f"a {base['model_type']} model"
