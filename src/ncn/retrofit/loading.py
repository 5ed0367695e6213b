"""A controller on its base: a saved one put back, and a new one for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ncn.config.model import CONTROLLER, ControllerConfig, NCNConfig
from ncn.config.recipe import Recipe
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.machine.files import read_json
from ncn.retrofit.attach import AttachedController, attach
from ncn.retrofit.bases import load_base, shape_of
from ncn.retrofit.families import Family
from ncn.retrofit.files import WEIGHTS, WORDS, describe_base
from ncn.retrofit.model import RetrofittedModel


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
    for name, word in WORDS.items():
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


def load_retrofitted(folder: Path) -> tuple[RetrofittedModel, Tokenizer]:
    """A controller with the base that it was trained on, and the tokenizer. Raises `UserError` where they are gone."""
    place = read_json(folder / CONTROLLER).get("base_name")
    if not isinstance(place, str):
        raise UserError(f"{folder} does not say where its base is; load the base, then ncn.load_controller(base, path)")
    base = load_base(place)
    handle = load_controller(base, folder)
    tokenizer = Tokenizer.load(folder)
    shape = NCNConfig.parse(shape_of(base.config) | {"separator_id": tokenizer.separator_id})
    return RetrofittedModel(handle, shape.override(controller=handle.config), place).eval(), tokenizer


def build_retrofitted(recipe: Recipe, device: torch.device) -> RetrofittedModel:
    """The base of a recipe with a new controller on it."""
    assert recipe.base is not None
    assert recipe.model.controller is not None
    base = load_base(recipe.base)
    base.to(device)  # type: ignore[arg-type]
    return RetrofittedModel(attach(base, recipe.model.controller), recipe.model, recipe.base)
