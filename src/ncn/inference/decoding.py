"""Decoding: the model continues a prompt, one token at a time, over one cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncn.core.cache import Cache
from ncn.core.interface import LanguageModel, ModelOutput
from ncn.core.types import ControlInputs, Instructions
from ncn.errors import UserError
from ncn.inference.sampling import check_sampling, choose
from ncn.machine.compiling import compiled
from ncn.steering.values import EMPTY_INSTRUCTION, SliderEnds, both_ends, check_ends


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_id: int | None = None,
    sliders: Mapping[str, SliderEnds] | None = None,
    task: str | None = None,
    instruction: Sequence[int] | None = None,
    guidance: float = 1.0,
    compile: bool = False,
) -> Iterator[int]:
    """Yield new token ids as they come; ends at `stop_id` (not yielded), after `max_tokens`, or at a full context.

    `temperature` 0 takes the likeliest token; else tokens are drawn, from the `top_k` likeliest and from the smallest
    set with probability `top_p` where given. The same `seed` gives the same tokens.

    `sliders` sets inputs of the controller by name, each a number from 0 to 1, or a pair of numbers: from the first at
    the prompt to the second at `max_tokens`. Those that are not named are unset. `task` names one of the model's tasks,
    and `instruction` is the token ids of an instruction. `guidance` above 1 extrapolates from the model without them to
    the model with them: logits are unset + guidance · (set - unset).

    `compile` compiles the step of one token, which takes up to a minute at the first text that a process writes with
    the model, and with each other kind of inputs from outside. From then on a step takes a third to two thirds of the
    time, because most of what it does is too little work for an operation of its own. Numbers may differ in their last
    bits from those of the step as it is. torch compiles eight kinds of step in one process; others run as they are.
    """
    check_sampling(max_tokens, temperature, top_k, top_p)
    setting = _Setting(model, sliders or {}, task, instruction, guidance, max_tokens)
    room = model.core_config.context_length - len(prompt)
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if room <= 0:
        raise UserError(
            f"the prompt has {len(prompt)} tokens (with the separator in front) and the model's context is "
            f"{model.core_config.context_length}; shorten it"
        )
    device = model.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    longest = model.core_config.context_length
    cache = Cache(capacity=longest if compile else min(len(prompt) + max_tokens, longest))
    step = _Step(model, compile)
    tokens = torch.tensor([prompt], device=device)
    for number in range(min(max_tokens, room)):
        rows = tokens.expand(setting.rows, -1)
        logits = setting.guided(
            step(rows, cache=cache, last_only=True, control=setting.inputs(number, device)).logits[:, -1]
        )
        chosen = choose(logits, temperature, top_k, top_p, generator)
        token = int(chosen)
        if token == stop_id:
            return
        yield token
        tokens = chosen.view(1, 1)


class _Step:
    """The model's forward pass, compiled if asked for where one compiled step serves all: for a single token after
    more than the controller's convolution reaches back to, in a cache of one size."""

    def __init__(self, model: LanguageModel, compile: bool) -> None:
        if compile and not model.compiles:
            raise UserError("a controller on a base writes as it is; leave out compile")
        self.model = model
        self.compiled = compiled(model.read, dynamic=True) if compile else None
        self.shortest = max(2, model.core_config.controller.phasic_kernel if model.core_config.controller else 0)

    def __call__(self, tokens: Tensor, *, cache: Cache, **options: Any) -> ModelOutput:
        if self.compiled is None or tokens.shape[1] > 1 or cache.length < self.shortest:
            result: ModelOutput = self.model.read(tokens, cache=cache, **options)
            return result
        return self.compiled(tokens, cache=cache, **options)


class _Setting:
    """The sliders, task and instruction of a text that is being written, and the guidance towards them."""

    def __init__(
        self,
        model: LanguageModel,
        sliders: Mapping[str, SliderEnds],
        task: str | None,
        instruction: Sequence[int] | None,
        guidance: float,
        max_tokens: int,
    ) -> None:
        known = model.core_config.controller.sliders if model.core_config.controller else ()
        check_ends(sliders, known)
        tasks = model.core_config.controller.tasks if model.core_config.controller else ()
        if task is not None and task not in tasks:
            raise UserError(f"this model has no task {task!r}; it has {', '.join(tasks) or 'none'}")
        if guidance < 0:
            raise UserError(f"guidance must be 0 or more, not {guidance}")
        if instruction is not None and not instruction:
            raise UserError(EMPTY_INSTRUCTION)
        if guidance != 1 and not sliders and task is None and instruction is None:
            raise UserError("guidance leads towards sliders, a task or an instruction, and none is set")
        self.guidance, self.last = guidance, max(max_tokens - 1, 1)
        self.rows = 1 if guidance == 1 else 2
        self.ends = [both_ends(sliders.get(name, math.nan)) for name in known] if sliders else []
        self.task = None if task is None else tasks.index(task)
        self.instruction = None if instruction is None else torch.tensor([[*instruction]])

    def inputs(self, number: int, device: torch.device) -> ControlInputs:
        """For the token after `number` new ones; the first of two rows is unset."""
        sliders = tasks = instruction = None
        if self.ends:
            share = min(number / self.last, 1)
            values = torch.tensor([[[first + share * (last - first) for first, last in self.ends]]])
            sliders = torch.cat([*[torch.full_like(values, math.nan)] * (self.rows - 1), values])
        if self.task is not None:
            tasks = torch.tensor([*[[-1]] * (self.rows - 1), [self.task]])
        if self.instruction is not None:
            instruction = Instructions(self.instruction, torch.tensor([*[[-1]] * (self.rows - 1), [0]]))
        return ControlInputs(sliders, tasks, instruction).to(device)

    def guided(self, logits: Tensor) -> Tensor:
        """The logits to draw from, of those of all rows."""
        if self.rows == 1:
            return logits[0]
        return logits[0] + self.guidance * (logits[1] - logits[0])
