"""What a training step differentiates, as one module: what wraps it, for many processes, sees all that is computed."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ncn.core.interface import LanguageModel
from ncn.core.signals.table import homeostatic_loss
from ncn.core.types import ControlInputs, Signal, TokenIds


class Loss(NamedTuple):
    """Of one micro-batch.

    `objective` is what is differentiated: the cross-entropy's share of the step's mean, and λ times `homeostatic`.
    `nats` is the cross-entropy summed over targets, and `homeostatic` the micro-batch's part of equation (6) without λ.
    """

    objective: Float[Tensor, ""]
    nats: Float[Tensor, ""]
    homeostatic: Float[Tensor, ""]
    signals: dict[str, Signal]


class Objective(nn.Module):
    """The loss of a micro-batch (equation 6), from one forward pass of the model."""

    def __init__(self, model: LanguageModel, chunk: int) -> None:
        """`chunk` is the number of tokens whose logits exist at once."""
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(
        self,
        inputs: TokenIds,
        targets: TokenIds,
        *,
        count: int,
        share: float,
        weight: float,
        control: ControlInputs | None = None,
        shares: Float[Tensor, "batch tokens"] | None = None,
    ) -> Loss:
        """
        Args:
            count: targets in the batch of the whole step, over all processes, by which sums are divided.
            share: this micro-batch's part of the sequences of the whole step.
            weight: λ.
            control: what is given from outside.
            shares: how many times each target counts; by default once.
        """
        nats, signals = self.model.loss(inputs, targets, chunk=self.chunk, control=control, shares=shares)
        objective = nats / count
        homeostatic = homeostatic_loss(signals) * share if signals else objective.new_zeros(())
        if weight:
            objective = objective + weight * homeostatic
        return Loss(objective, nats, homeostatic, signals)
