"""Controllers on disk: `controller.safetensors` and `controller.json`, a few hundred KB beside the base they fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ncn.config import ControllerConfig, NCNConfig
from ncn.errors import UserError
from ncn.files import write_atomically
from ncn.retrofit.attach import AttachedController, attach
from ncn.retrofit.families import LONGEST_MEMORY, Family, core_config
from ncn.runs import read_json
from ncn.store import CONTROLLER, write_tensors

WEIGHTS = "controller.safetensors"
_CHANGEABLE = {
    "transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "use_cache", "architectures",
    "quantization_config", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation",
}  # fmt: skip
_WORDS = {
    "model_type": "architecture", "hidden_size": "width", "num_hidden_layers": "number of layers",
    "num_attention_heads": "number of attention heads", "vocab_size": "vocabulary size",
}  # fmt: skip


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What a controller must find again: architecture and widths, and a hash of all that the configuration decides."""
    config: Any = model.config.get_text_config()
    settings = {name: value for name, value in config.to_dict().items() if name not in _CHANGEABLE}
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        **{name: getattr(config, name) for name in _WORDS},
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def save_controller(handle: AttachedController, folder: Path, base_name: str | None = None) -> None:
    """Write the controller; each file under a temporary name first. The configuration comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in handle.controller.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors)
    content = {
        "format": 1,
        "controller": handle.config.model_dump(mode="json"),
        "base": describe_base(handle.model),
    } | ({"base_name": base_name} if base_name else {})
    write_atomically(folder / CONTROLLER, json.dumps(content, indent=2) + "\n")


def read_controller(folder: Path) -> tuple[NCNConfig, str]:
    """The form of a saved controller on its base, and where that base is, as far as it was written down; neither the
    weights nor the base are read. Raises `UserError` for files that describe no controller."""
    content = read_json(folder / CONTROLLER)
    try:
        base = content["base"]
        # how far the base reads is not written down
        config = SimpleNamespace(**{name: base[name] for name in _WORDS}, max_position_embeddings=LONGEST_MEMORY)
        shape = core_config(config, ControllerConfig(**content["controller"]), base["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder / CONTROLLER} describes no controller on a base: {reason}") from None
    return shape, content.get("base_name") or f"a {base['model_type']} model"


def load_controller(
    model: PreTrainedModel, folder: str | Path, *, family: Family | None = None, freeze_base: bool = True
) -> AttachedController:
    """Attach the controller saved in `folder` to its base.

    Raises:
        UserError: there is no controller there, its files are damaged, or it was made for another base; and what
            `attach` raises.
    """
    folder = Path(folder)
    content = read_json(folder / CONTROLLER)
    missing = {"format", "controller", "base"} - content.keys()
    if missing:
        raise UserError(f"{folder / CONTROLLER} lacks {', '.join(sorted(missing))}: it describes no controller")
    inner: Any = model
    base = describe_base(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)
    for name, word in _WORDS.items():
        if base[name] != content["base"].get(name):
            raise UserError(
                f"the controller in {folder} was made for a base whose {word} is {content['base'].get(name)}; "
                f"this one's is {base[name]}"
            )
    if base["config_sha256"] != content["base"].get("config_sha256"):
        raise UserError(
            f"the controller in {folder} was made for a base of the same shape whose configuration differs from this "
            "one's; load the base that it was trained on"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder / WEIGHTS} is missing") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
    config = ControllerConfig.parse(content["controller"])
    handle = attach(model, config, family=family, freeze_base=freeze_base)
    try:
        with torch.no_grad():
            handle.controller.load_state_dict(tensors)
    except RuntimeError:
        handle.detach()
        raise UserError(f"{folder / WEIGHTS} does not hold the controller that {CONTROLLER} describes") from None
    return handle
