"""The axes of every tensor in the package, and the aliases built from them.

==========  =====================================================================
batch       sequences
tokens      positions of the sequences at hand
slots       positions held by a cache: those before, then those at hand
layers      transformer layers
heads       attention heads; kv_heads: key/value heads, fewer under grouped-query attention
head_dim    width of one head
width       width of the residual stream (d_model), or of the controller's input
pools       heads of the salience pooling; values: width of what one of them pools
==========  =====================================================================
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, device

TokenIds = Int[Tensor, "batch tokens"]
Segments = Int[Tensor, "batch tokens"]
"""Which document each position belongs to; 0 is padding. Positions see one another only within one segment."""
Hidden = Float[Tensor, "batch tokens width"]
Logits = Float[Tensor, "batch tokens vocabulary"]
Signal = Float[Tensor, "batch tokens layers"] | Float[Tensor, "batch tokens layers sites"]
"""A control signal: one value per layer, or one per head (or sublayer) of each layer."""
Sliders = Float[Tensor, "#batch #tokens sliders"]
"""Inputs of the controller from outside, each from 0 to 1, or NaN where it is unset."""
Tasks = Int[Tensor, "#batch #tokens"]
"""The place of a task in `controller.tasks`, or -1 where it is unset."""
AttentionMask = Bool[Tensor, "#batch 1 tokens slots"] | Float[Tensor, "#batch 1 tokens slots"]
"""True or 0 where a slot may be read, False or −∞ where not."""


class Instructions(NamedTuple):
    """Instructions in tokens, which the model pools itself."""

    ids: Int[Tensor, "instructions words"]
    """-1 at padding."""
    which: Int[Tensor, "#batch #tokens"]
    """The row of `ids` that each token has, or -1 where it has none."""

    def to(self, place: device) -> "Instructions":
        """The same on another device."""
        return Instructions(self.ids.to(place), self.which.to(place))

    def of_rows(self, rows: slice) -> "Instructions":
        """Those of a part of the batch."""
        return Instructions(self.ids, self.which[rows])


class ControlInputs(NamedTuple):
    """What is given from outside, for every token or once for all of them; None: nothing of the kind."""

    sliders: Sliders | None = None
    """In the order of `controller.sliders`, each from 0 to 1, NaN where unset."""
    tasks: Tasks | None = None
    """Places in `controller.tasks`, -1 where unset."""
    instruction: Float[Tensor, "#batch #tokens width"] | Instructions | None = None
    """Pooled embeddings of an instruction's tokens (`ModulatedTransformer.pool_instruction`), 0 where unset; or the
    tokens themselves."""

    def to(self, place: device) -> "ControlInputs":
        """The same on another device."""
        return ControlInputs(
            **{name: None if value is None else value.to(place) for name, value in self._asdict().items()}
        )

    def of_rows(self, rows: slice) -> "ControlInputs":
        """The same for a part of the batch; every input that is given has one row for each sequence."""
        instruction = self.instruction
        if instruction is not None:
            instruction = instruction.of_rows(rows) if isinstance(instruction, Instructions) else instruction[rows]
        return ControlInputs(
            None if self.sliders is None else self.sliders[rows],
            None if self.tasks is None else self.tasks[rows],
            instruction,
        )
