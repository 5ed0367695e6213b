"""What every model offers to those that train, read, write with, scan and diagnose it.

Three classes offer it: our own `ModulatedTransformer`, a controller on somebody else's base (`RetrofittedModel`), and
our model in the library transformers (`NCNForCausalLM`). Each says how it embeds, how hidden states and signals come
about, and what turns hidden states into logits; logits and losses follow here, once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.controller.controller import SignalSource
from ncn.core.controller.inputs import check_inputs, mean_embedding
from ncn.core.operations.linear import linear
from ncn.core.operations.loss import capped, chunked_cross_entropy, token_losses
from ncn.core.signals.table import Frozen, homeostatic_loss
from ncn.core.types import ControlInputs, Hidden, Instructions, Logits, Signal, TokenIds
from ncn.errors import UserError


@dataclass
class ModelOutput:
    """What reading gives: `logits`, and on request the `signals` and their `homeostatic_loss` (equation 6)."""

    logits: Logits
    signals: dict[str, Signal] | None = None
    homeostatic_loss: Float[Tensor, ""] | None = None


class LanguageModel(nn.Module, ABC):
    """A causal language model whose layers may be under the control of signals."""

    logit_cap: float | None = None
    """Where logits level off: cap · tanh(logits / cap). Only a base of others has one."""

    compiles = False
    """Whether the step of one token can be compiled."""
    controller: SignalSource | None
    """Where the signals come from; None: there are none."""

    @property
    @abstractmethod
    def core_config(self) -> NCNConfig:
        """The model's form, and its controller's."""

    @property
    @abstractmethod
    def output_weight(self) -> Float[Tensor, "vocabulary width"]:
        """The matrix that turns hidden states into logits."""

    @abstractmethod
    def embed(self, input_ids: TokenIds) -> Hidden:
        """Token embeddings; raises `UserError` for ids outside the vocabulary (on CPU, where looking costs nothing)."""

    @abstractmethod
    def hidden_states(
        self,
        embeddings: Hidden,
        input_ids: TokenIds | None = None,
        attention_mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        cache: Cache | None = None,
        frozen: Frozen | None = None,
        control: ControlInputs | None = None,
    ) -> tuple[Hidden, dict[str, Signal]]:
        """The final, normalised hidden states and the signals, from token embeddings.

        `input_ids` are needed only to find document borders; the other arguments are those of `read`. An instruction
        in `control` is pooled already.
        """

    @abstractmethod
    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what `ncn.load` needs of the model, but for its tokenizer, to a folder that exists; every file under a
        temporary name first. `dtype` is the number format of the weights (default: the one they have)."""

    def new_cache(self, capacity: int = 0, *, joins: bool = False) -> Cache:
        """An empty cache for reading piece by piece, of `capacity` slots at first. `joins`: whether it will be joined
        with others (`Cache.joined`)."""
        return Cache(capacity)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output_weight.device

    def read(
        self,
        input_ids: TokenIds,
        attention_mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        cache: Cache | None = None,
        output_signals: bool = False,
        frozen: Frozen | None = None,
        last_only: bool = False,
        control: ControlInputs | None = None,
    ) -> ModelOutput:
        """Logits for every position (or the last one only).

        `attention_mask` is False at padding, which may stand on the left of a sequence. `cache` continues what it
        holds, and is extended. `frozen` replaces signals by given values. `control` is what the
        controller is given from outside. Raises `UserError` for token ids outside the vocabulary, for sequences beyond
        the context length, and for inputs that the model does not have.
        """
        hidden, signals = self.hidden_states(
            self.embed(input_ids), input_ids, attention_mask, cache=cache, frozen=frozen, control=self.pooled(control)
        )
        logits = self.logits(hidden[:, -1:] if last_only else hidden)
        if not output_signals:
            return ModelOutput(logits)
        return ModelOutput(logits, signals, homeostatic_loss(signals) if signals else logits.new_zeros(()))

    forward = read

    def loss(
        self,
        input_ids: TokenIds,
        targets: TokenIds,
        *,
        frozen: Frozen | None = None,
        chunk: int = 512,
        control: ControlInputs | None = None,
        shares: Float[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Signal]]:
        """Cross-entropy summed over the targets that are not -100, each as many times as its share if there are
        `shares`, in nats, and the signals; never holds all logits."""
        hidden, signals = self.hidden_states(
            self.embed(input_ids), input_ids, frozen=frozen, control=self.pooled(control)
        )
        weighed = None if shares is None else shares.flatten()
        return chunked_cross_entropy(
            hidden.flatten(0, 1), self.output_weight, targets.flatten(), chunk, self.logit_cap, weighed
        ), signals

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: TokenIds,
        targets: TokenIds,
        *,
        frozen: Frozen | None = None,
        control: ControlInputs | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Cross-entropy at every position, in nats, zero where the target is -100; without gradients."""
        hidden, _ = self.hidden_states(self.embed(input_ids), input_ids, frozen=frozen, control=self.pooled(control))
        return self.losses_of(hidden, targets)

    def losses_of(self, hidden: Hidden, targets: TokenIds) -> Float[Tensor, "batch tokens"]:
        """Cross-entropy at every position, from the final hidden states; see `token_losses`."""
        flat = token_losses(hidden.flatten(0, 1), self.output_weight, targets.flatten(), cap=self.logit_cap)
        return flat.view(targets.shape)

    def logits(self, hidden: Hidden) -> Logits:
        """From the final hidden states."""
        return capped(linear(hidden, self.output_weight), self.logit_cap)

    def pooled(self, control: ControlInputs | None) -> ControlInputs | None:
        """The same inputs, an instruction that is given in tokens as what `pool_instruction` makes of them."""
        if control is None or not isinstance(control.instruction, Instructions):
            return control
        check_inputs(control, self.core_config)
        ids, which = control.instruction
        table = F.pad(self.pool_instruction(ids).squeeze(1), (0, 0, 0, 1))  # the last row, for -1, is unset
        return control._replace(instruction=table[which])

    def pool_instruction(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch 1 width"]:
        """The mean embedding of an instruction's tokens, as `ControlInputs` takes it; -1 is padding."""
        return mean_embedding(self.embed(ids.clamp(min=0)), ids >= 0)


def embedded(embedding: nn.Module, input_ids: TokenIds, vocab_size: int) -> Hidden:
    """The rows of an embedding; raises `UserError` for ids that it has not got (on CPU)."""
    try:
        embeddings: Tensor = embedding(input_ids)
    except IndexError:  # raised on CPU; asking the ids beforehand would cost as much as the look-up
        low, high = torch.aminmax(input_ids)
        raise UserError(
            f"token id {int(high if low >= 0 else low)} lies outside the vocabulary of {vocab_size}; "
            "does the tokenizer belong to this model?"
        ) from None
    return embeddings
