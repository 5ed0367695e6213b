"""`guidance_scale` in the base's own `generate`, away from the text without what `AttachedController.given` is told.

The library reads the text a second time with the same model, and so with the same inputs: without this, guidance would
lead away from the end of the prompt, and towards nothing that is given.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ncn.hf.guidance import MASK, TEXT, Settings, second_reading


def use_guidance(
    model: PreTrainedModel, is_given: Callable[[], bool], unset: Callable[[], AbstractContextManager[None]]
) -> Callable[[], object]:
    """Make the model's `generate` guide towards what is given; returns what undoes it.

    Args:
        is_given: whether there are inputs at hand; without any, the library's own guidance is left as it is.
        unset: leaves them out inside a `with` block.
    """
    plain: Any = model.generate
    places = "position_ids" in inspect.signature(model.forward).parameters

    def read(input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        if places:  # which the library leaves out here: a padded row would be read in the wrong place
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
        with unset():
            return model(input_ids, attention_mask=attention_mask, **kwargs)

    @functools.wraps(plain)
    def generate(
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        settings = Settings(model, generation_config, kwargs)
        strength = settings.get("guidance_scale", 1)
        if strength != 1 and is_given():
            text: Any = second_reading(settings, inputs, kwargs)
            guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
                strength, read, text[TEXT], text[MASK], settings.get("use_cache", True)
            )
            logits_processor = LogitsProcessorList([guidance, *(logits_processor or [])])
            # the library would guide a second time
            if generation_config is not None and generation_config.guidance_scale is not None:
                generation_config = copy.deepcopy(generation_config)
                generation_config.guidance_scale = 1
            kwargs = {name: value for name, value in kwargs.items() if name not in text} | {"guidance_scale": 1}
        return plain(inputs, generation_config, logits_processor, *args, **kwargs)

    vars(model)["generate"] = generate
    return lambda: vars(model).pop("generate")
