"""Inputs of the controller from outside (κ of equation 2): sliders, a task, and an instruction in words.

All of them enter without a bias, so that what is unset adds exactly nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.operations.linear import exact_dtype, linear_like
from ncn.core.types import ControlInputs, Hidden
from ncn.errors import UserError


def check_inputs(given: ControlInputs, config: NCNConfig) -> None:
    """Raises `UserError` for inputs that the model does not have."""
    controller = config.controller
    sliders = controller.sliders if controller else ()
    if given.sliders is not None and (given.sliders.shape[-1] != len(sliders) or not sliders):
        raise UserError(
            f"{given.sliders.shape[-1]} sliders were given, and this model has {len(sliders)}"
            + (f": {', '.join(sliders)}" if sliders else "; train one with controller.sliders=[...]")
        )
    tasks = controller.tasks if controller else ()
    if given.tasks is not None:
        if not tasks:
            raise UserError("a task was given, and this model has none; train one with controller.tasks=[...]")
        # looking at numbers would end a compiled graph
        low, high = (-1, -1) if torch.compiler.is_compiling() else map(int, torch.aminmax(given.tasks))
        if low < -1 or high >= len(tasks):
            raise UserError(
                f"task {high if high >= len(tasks) else low} was given; this model has 0 to {len(tasks) - 1} "
                f"({', '.join(tasks)}), and -1 is unset"
            )
    if given.instruction is not None and not (controller and controller.instructions):
        raise UserError("an instruction was given, and this model takes none; train with controller.instructions=true")


def mean_embedding(
    embeddings: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch 1 width"]:
    """An instruction as `ControlInputs` takes it: the mean over its real tokens; 0 where there are none."""
    weights = real.unsqueeze(-1)
    return (embeddings * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)


class ExternalInputs(nn.Module):
    """κ: a linear map of every input, to the width of the controller's own; and of the sliders, straight to `outputs`
    raw signals."""

    def __init__(self, config: NCNConfig, outputs: int) -> None:
        super().__init__()
        controller = config.controller
        assert controller is not None
        count, width = len(controller.sliders_read), controller.width
        self.eps = config.norm_eps
        self.sliders = nn.Linear(2 * count, width, bias=False) if count else None
        self.straight = nn.Linear(2 * count, outputs, bias=False) if count else None
        self.tasks = nn.Embedding(len(controller.tasks), width) if controller.tasks else None
        self.instruction = nn.Linear(config.d_model, width, bias=False) if controller.instructions else None

    def reset_parameters(self) -> None:
        """Beside a context of about unit size, half of its size each; on the straight way nothing: a neutral start."""
        for module in (self.sliders, self.instruction):
            if module is not None:
                nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
        if self.straight is not None:
            nn.init.zeros_(self.straight.weight)
        if self.tasks is not None:
            nn.init.normal_(self.tasks.weight, std=0.5)

    def forward(self, given: ControlInputs) -> Float[Tensor, "#batch #tokens width"] | None:
        """The sum over the inputs that are given; None where nothing is."""
        terms: list[Tensor] = []
        if self.sliders is not None and given.sliders is not None:
            terms.append(linear_like(known_values(given.sliders.to(exact_dtype(self.sliders.weight))), self.sliders))
        if self.tasks is not None and given.tasks is not None:
            terms.append(self.tasks(given.tasks.clamp(min=0)) * (given.tasks >= 0).unsqueeze(-1))
        if self.instruction is not None and given.instruction is not None:
            assert isinstance(given.instruction, Tensor), "the model pools instructions that are given in tokens"
            pooled = given.instruction.to(exact_dtype(self.instruction.weight))
            normed: Hidden = nn.functional.rms_norm(pooled, pooled.shape[-1:], eps=self.eps)
            terms.append(linear_like(normed, self.instruction))
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def straight_to_signals(self, given: ControlInputs) -> Float[Tensor, "#batch #tokens outputs"] | None:
        """What the sliders add to the raw signals without a look at the text; None where none are given."""
        if self.straight is None or given.sliders is None:
            return None
        return linear_like(known_values(given.sliders.to(exact_dtype(self.straight.weight))), self.straight)


def known_values(sliders: Tensor) -> Tensor:
    """Each slider as two numbers: its value around 0 and whether it is set, both 0 where it is not."""
    known = ~sliders.isnan()
    return torch.cat([torch.where(known, 2 * sliders - 1, 0), known.to(sliders.dtype)], -1)
