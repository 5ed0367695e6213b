"""What `AttachedController.given` is told, in the base's tokens and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.controller.inputs import mean_embedding
from ncn.core.types import ControlInputs
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.steering.values import InputValues, InstructionIds, SliderValues, TaskValues, instruction_ids

Instruction = str | Sequence[str | None] | InstructionIds
InputsAt = Callable[[int, int, int], ControlInputs | None]
"""What is given to a batch of so many rows, from which place on, for how many tokens."""


def inputs_at(
    model: nn.Module,
    config: NCNConfig,
    sliders: SliderValues | None,
    task: TaskValues,
    instruction: Instruction | None,
    tokenizer: Any,
) -> InputsAt:
    """The inputs of a controller of the form `config` on `model`; raises `UserError` as `AttachedController.given`."""
    if isinstance(instruction, str) or (
        isinstance(instruction, Sequence) and any(isinstance(row, str) for row in instruction)
    ):
        if tokenizer is None:
            raise UserError("an instruction in words needs the base's tokenizer: given(..., tokenizer=tokenizer)")
        plain = {} if isinstance(tokenizer, Tokenizer) else {"add_special_tokens": False}
        words = cast("str | Sequence[str | None]", instruction)
        instruction = instruction_ids(words, lambda text: list(tokenizer.encode(text, **plain)))
    given = InputValues.of(config, sliders, task, cast("InstructionIds | None", instruction))
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]

    def pool(ids: Tensor) -> Tensor:
        return mean_embedding(embedding(ids.clamp(min=0)).float(), ids >= 0)

    def at(batch: int, start: int, tokens: int) -> ControlInputs | None:
        return None if given is None else given.at(batch, start, tokens, embedding.weight.device, pool)

    return at


def stretch(args: tuple[Any, ...], kwargs: dict[str, Any], cache: Cache | None) -> tuple[int, int, int]:
    """What a decoder is called with: the rows of the batch, the first place, and the number of tokens."""
    inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    batch, tokens = next(tensor.shape[:2] for tensor in inputs if tensor is not None)
    return batch, 0 if cache is None else cache.length, tokens
