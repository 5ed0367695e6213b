"""`guidance_scale` in the library's `generate`: its second reading of the text is of the same text, without inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ncn.errors import UserError

TEXT, MASK = "negative_prompt_ids", "negative_prompt_attention_mask"


class Settings:
    """What a call of `generate` asks for: by its arguments, by its `generation_config`, or by the model's own."""

    def __init__(self, model: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        self._kwargs, self._configs = kwargs, (config, model.generation_config)

    def get(self, name: str, default: Any = None) -> Any:
        """The first that is not None."""
        values = (self._kwargs.get(name), *(getattr(config, name, None) for config in self._configs))
        return next((value for value in values if value is not None), default)


def second_reading(settings: Settings, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    """The text that guidance leads away from, and its mask, under the names that `generate` has for them: the prompt,
    unless a negative one is given. Raises `UserError` where there is no text, and with beams."""
    if settings.get("num_beams", 1) > 1:
        raise UserError("guidance_scale does not follow beams from token to token; use num_beams=1, or sample")
    if kwargs.get(TEXT) is not None:
        return {TEXT: kwargs[TEXT], MASK: kwargs.get(MASK)}
    ids, copies = kwargs.get("input_ids") if inputs is None else inputs, settings.get("num_return_sequences", 1)
    if ids is None:
        raise UserError("guidance_scale reads the text a second time: give generate its input_ids")
    mask = kwargs.get("attention_mask")
    if mask is None and (padding := settings.get("pad_token_id")) is not None:
        ends = settings.get("eos_token_id")
        if padding not in (ends if isinstance(ends, list) else [ends]):  # as the library finds padding by itself
            mask = (ids != padding).long()
    return {
        TEXT: ids.repeat_interleave(copies, 0),
        MASK: None if mask is None else mask.repeat_interleave(copies, 0),
    }
