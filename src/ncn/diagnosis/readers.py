"""What a diagnosis needs of a model: losses and signals of a batch, with some of the signals held at given values.

Any object with the attributes of `Reader` will do, so that a controller from elsewhere can be diagnosed too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ncn.config.signals import SIGNALS
from ncn.config.training import IGNORED
from ncn.core.interface import LanguageModel
from ncn.core.signals.table import Frozen, range_map
from ncn.core.types import TokenIds
from ncn.errors import UserError
from ncn.models.published import SIGNALS as PUBLISHED_SIGNALS
from ncn.models.published import NonCausalWarning, PublishedNCN

Losses = Float[Tensor, "batch tokens"]


@runtime_checkable
class Reader(Protocol):
    """A model as a diagnosis sees it.

    Attributes:
        kind: one sentence on where the signals come from.
        causal: whether earlier positions are untouched by later tokens. Only then are texts of different lengths read
            in one batch, padded on the right.
        context_length: most tokens of a text.
        vocab_size: token ids are below it.
        neutral: for each signal, the value that changes nothing.
        bounds: for each signal, the limits of its range.
    """

    kind: str
    causal: bool
    context_length: int
    vocab_size: int
    neutral: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]]

    def read(
        self, inputs: TokenIds, targets: TokenIds, frozen: Frozen | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        """Nats at every position (0 where the target is -100), and the signals, (batch, tokens, layers[, sites]).

        `frozen` names signals to hold at given values, tensors that broadcast to the signal's shape.
        """
        ...


class ModelReader:
    """Reads a model of whichever kind, with whichever source of signals it has."""

    def __init__(self, model: LanguageModel) -> None:
        controller = model.core_config.controller
        if controller is None:
            raise UserError(
                "this model has no controller, so there are no signals to diagnose: use a model that has one"
            )
        self.model = model
        self.kind = {
            "ncn": "a controller, a small network beside the model",
            "local": "local gates: every layer reads its signals from its own input",
            "static": "static gates: learned constants, the same for every token",
        }[controller.kind]
        self.causal = True
        self.context_length, self.vocab_size = model.core_config.context_length, model.core_config.vocab_size
        self.neutral, self.bounds = _ranges(controller.signals, controller.maps)

    @torch.inference_mode()
    def read(
        self, inputs: TokenIds, targets: TokenIds, frozen: Frozen | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        model, device = self.model, self.model.device
        inputs, targets = inputs.to(device), targets.to(device)
        was_training = model.training
        model.eval()
        try:
            hidden, signals = model.hidden_states(model.embed(inputs), inputs, frozen=frozen)
            nats = model.losses_of(hidden, targets)
        finally:
            model.train(was_training)
        return nats, signals


class PublishedReader:
    """Reads the published model as it was trained: the whole text at once, which lets its signals see later tokens."""

    def __init__(self, model: PublishedNCN) -> None:
        self.model = model
        self.kind = "the published controller in its whole-sequence mode, which pools over all of the text"
        self.causal = False
        self.context_length, self.vocab_size = model.config.max_position_embeddings, model.config.vocab_size
        self.neutral, self.bounds = _ranges(PUBLISHED_SIGNALS, "published")

    @torch.inference_mode()
    def read(
        self, inputs: TokenIds, targets: TokenIds, frozen: Frozen | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        def replace(_module: object, _inputs: object, signals: dict[str, Tensor]) -> dict[str, Tensor]:
            held = {name: value.to(signals[name]).expand_as(signals[name]) for name, value in (frozen or {}).items()}
            return signals | held

        device = self.model.output_head.weight.device
        hook = self.model.ncn.register_forward_hook(replace)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonCausalWarning)  # the diagnosis says it in words
                output = self.model(inputs.to(device))
        finally:
            hook.remove()
        flat = F.cross_entropy(
            output.logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(targets.shape), output.signals


def _ranges(
    names: Sequence[str], maps: Literal["smooth", "published"]
) -> tuple[Mapping[str, float], Mapping[str, tuple[float, float]]]:
    found = {name: range_map(name, maps) for name in names}
    bounds = {name: (mapping.low, mapping.high) for name, mapping in found.items()}
    return {name: SIGNALS[name].neutral for name in names}, bounds


def reader_of(model: LanguageModel | PublishedNCN | Reader) -> Reader:
    """The reader of a model; a reader is its own. Raises `UserError` for a model without a controller."""
    if isinstance(model, LanguageModel):
        return ModelReader(model)
    if isinstance(model, PublishedNCN):
        return PublishedReader(model)
    return model
