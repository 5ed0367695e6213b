"""Reading the models that controllers are put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ncn.errors import UserError
from ncn.retrofit.families import core_config


def load_base(place: str | Path) -> PreTrainedModel:
    """A base in float32 and evaluation mode, from a folder or the hub; raises `UserError` where there is none."""
    model: Any = read_base(place, AutoModelForCausalLM, dtype=torch.float32)
    found: PreTrainedModel = model.eval()
    return found


def read_base(place: str | Path, loader: Any, **options: Any) -> Any:
    """What an Auto class makes of a folder or a hub name; raises `UserError` where it can make nothing."""
    try:
        return loader.from_pretrained(str(place), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"no base model at {str(place)!r} that transformers can load: {reason}") from None


def shape_of(config: Any) -> dict[str, Any]:
    """A base's form as the settings of our own model, from its transformers configuration."""
    config = config.get_text_config()
    shape = core_config(config, None, config.num_hidden_layers)
    return shape.model_dump(exclude={"controller", "separator_id"}) | {
        "context_length": config.max_position_embeddings,
    }
