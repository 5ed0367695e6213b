"""Inputs of the controller from outside (κ of equation 2): sliders, a task, and an instruction in words.

All of them enter without a bias, so that what is unset adds exactly nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ncn.config import NCNConfig
from ncn.errors import UserError
from ncn.linear import exact_dtype, linear_like
from ncn.types import ControlInputs, Hidden, Sliders


def input_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that inputs from outside enter by, by name."""
    places = (ExternalInputs, SliderEmbedding, SliderAdapters)
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, places)
        for name, parameter in module.named_parameters()
    }


def hold_still_but_inputs(model: nn.Module) -> None:
    """Let training change nothing but what inputs from outside enter by. Raises `UserError` if there are none."""
    inputs = input_parameters(model)
    if not inputs:
        raise UserError("train.only_inputs needs inputs to train, such as controller.sliders=[length]")
    model.requires_grad_(False)
    for parameter in inputs.values():
        parameter.requires_grad_(True)


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


class SliderEmbedding(nn.Module):
    """What sliders in the controller are compared with: a linear map of them to the width of the embeddings, added to
    those of all tokens, or, as a prefix token, to that of the token that begins a document, which the attention of
    all the others sees."""

    def __init__(self, d_model: int, count: int, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = nn.Parameter(torch.empty(d_model, 2 * count))  # the model initialises it with its embeddings

    @classmethod
    def of(cls, config: NCNConfig) -> SliderEmbedding | None:
        """The one that the configuration asks for; None where sliders enter the controller, or there are none."""
        controller = config.controller
        if controller is None or not controller.sliders or controller.sliders_enter not in ("prefix", "embedding"):
            return None
        return cls(config.d_model, len(controller.sliders), controller.sliders_enter == "prefix")

    def forward(self, embeddings: Hidden, sliders: Sliders, begins: Bool[Tensor, "#batch tokens"]) -> Hidden:
        """The embeddings with those of the sliders. `begins` is true where a document begins."""
        added = nn.functional.linear(known_values(sliders.to(self.weight.dtype)), self.weight)
        return embeddings + (added * begins.unsqueeze(-1) if self.prefix else added)


class SliderAdapters(nn.Module):
    """Sliders in the layers. At every place, the input of each sublayer and what the last norm reads, they add

        W s + U (φ(V x̂ + C s) − φ(V x̂))

    to the residual stream x. s are the sliders' known values, x̂ is x normalised, φ is GELU. W gives each slider a
    direction of its own; U, V and C are an adapter of `rank` units (Houlsby et al., Parameter-efficient transfer
    learning for NLP, 2019), of which only that remains which the sliders change in it. So what is unset adds exactly
    nothing; and as W and U begin at zero, so does what is set.
    """

    def __init__(self, d_model: int, places: int, count: int, rank: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.direction = nn.Parameter(torch.empty(places, d_model, 2 * count))
        self.read = nn.Parameter(torch.empty(places, rank, d_model))
        self.turn = nn.Parameter(torch.empty(places, rank, 2 * count))
        self.write = nn.Parameter(torch.empty(places, d_model, rank))

    @classmethod
    def of(cls, config: NCNConfig) -> SliderAdapters | None:
        """Those that the configuration asks for; None where sliders enter elsewhere, or there are none."""
        controller = config.controller
        if controller is None or not controller.sliders or controller.sliders_enter != "layers":
            return None
        places = 2 * config.num_layers + 1
        return cls(config.d_model, places, len(controller.sliders), controller.slider_rank, config.norm_eps)

    def reset_parameters(self) -> None:
        for matrices in (self.direction, self.write):
            nn.init.zeros_(matrices)
        for matrices in (self.read, self.turn):
            nn.init.normal_(matrices, std=matrices.shape[-1] ** -0.5)

    def forward(self, sliders: Sliders) -> Adapters:
        """What the places need. The products are left to them: all at once they would be as large as the activations
        of all layers."""
        known = known_values(sliders.to(self.direction.dtype))
        return Adapters(known, self.direction, self.read, self.turn, self.write, self.eps)


class Adapters(NamedTuple):
    """Known values of sliders, and the parameters of `SliderAdapters` for all places."""

    known: Float[Tensor, "#batch #tokens numbers"]
    direction: Float[Tensor, "places width numbers"]
    read: Float[Tensor, "places rank width"]
    turn: Float[Tensor, "places rank numbers"]
    write: Float[Tensor, "places width rank"]
    eps: float


def adapted(x: Hidden, adapters: Adapters | None, place: int) -> Hidden:
    """x with what sliders add at a place; None is nothing."""
    if adapters is None:
        return x
    known, direction, read, turn, write, eps = adapters
    linear, gelu = nn.functional.linear, nn.functional.gelu
    units = linear(nn.functional.rms_norm(x, x.shape[-1:], eps=eps), read[place])
    changed = gelu(units + linear(known, turn[place])) - gelu(units)
    return x + linear(known, direction[place]) + linear(changed, write[place])


def known_values(sliders: Tensor) -> Tensor:
    """Each slider as two numbers: its value around 0 and whether it is set, both 0 where it is not."""
    known = ~sliders.isnan()
    return torch.cat([torch.where(known, 2 * sliders - 1, 0), known.to(sliders.dtype)], -1)
