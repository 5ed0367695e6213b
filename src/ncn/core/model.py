"""The language model, top to bottom: a pre-norm transformer whose layers obey control signals (equation 5).

    x ← x + μ · x̂₀        x' = x + g · Attention(ν · Norm x; β, η)        x'' = x' + g · γ · FFN(ν · Norm x')

Without a controller the same code is the static baseline.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ncn.config.model import CONFIG, WEIGHTS, NCNConfig, saved_config
from ncn.core.cache import Cache
from ncn.core.controller.controller import SignalSource, signal_source
from ncn.core.controller.inputs import check_inputs
from ncn.core.interface import LanguageModel, embedded
from ncn.core.layers import Layer
from ncn.core.operations.norm import RMSNorm
from ncn.core.operations.rotary import rotary_tables
from ncn.core.segments import attention_mask_of, find_segments, positions_in_segment
from ncn.core.signals.modulation import UNMODULATED, Factors, add_scaled, layer_factors
from ncn.core.signals.table import Frozen, SignalLayout, freeze
from ncn.core.sliders import Adapters, SliderAdapters, SliderEmbedding, adapted
from ncn.core.types import ControlInputs, Hidden, Signal, TokenIds
from ncn.errors import UserError
from ncn.machine.files import write_json
from ncn.machine.tensors import write_tensors


class ModulatedTransformer(LanguageModel):
    """A causal language model with a controller (`config.controller`), or without one (None: the static baseline)."""

    compiles = True

    def __init__(self, config: NCNConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=()):  # torch's constructors draw numbers that are thrown away
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.position_embedding = (
                nn.Embedding(config.context_length, config.d_model) if config.positions == "learned" else None
            )
            self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
            self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
            self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.controller: SignalSource | None = signal_source(config)
            self.slider_embedding = SliderEmbedding.of(config)
            self.slider_adapters = SliderAdapters.of(config)
        self.checkpointing = False
        """Whether the backward pass recomputes each layer instead of keeping what it computed: slower, far smaller."""
        self.layout = SignalLayout.of(config) if config.controller else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All initialisation, in one place.

        Under one seed, models that differ in their controller or in the width of their feed-forward blocks start from
        the same weights where they share them: one number is drawn from torch's generator, each matrix of the backbone
        has a generator of its own, seeded with that number and the matrix's name, and what the narrower block holds
        comes first in it. The controller draws from torch's generator; its neutral start comes last.
        """
        std, config = self.config.init_std, self.config
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        for name, parameter in self.named_parameters():
            if name.startswith(("controller.", "slider_adapters.")):
                continue
            if parameter.ndim < 2:
                nn.init.ones_(parameter)  # the weights of the norms: the backbone has no biases
            elif not parameter.is_meta:
                # what writes into the residual stream is scaled down by the number of writers, as in GPT-2
                writes = name.endswith(("attention.output.weight", "ffn.down.weight"))
                gated = config.activation == "swiglu" and name.endswith("ffn.up.weight")
                drawn = _normal_matrix(seed, name, parameter.shape, gated)
                parameter.copy_(drawn * (std / (2 * config.num_layers) ** 0.5 if writes else std))
        if self.controller is not None:
            self.controller.reset_parameters()
        if self.slider_adapters is not None:
            self.slider_adapters.reset_parameters()

    @property
    def core_config(self) -> NCNConfig:
        return self.config

    @property
    def output_weight(self) -> Float[Tensor, "vocabulary width"]:
        return self.embedding.weight if self.head is None else self.head.weight

    def embed(self, input_ids: TokenIds) -> Hidden:
        return embedded(self.embedding, input_ids, self.config.vocab_size)

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
        config, (batch, tokens) = self.config, embeddings.shape[:2]
        if not tokens:
            raise UserError("there are no tokens: give at least one")
        if cache is not None:
            cache.check_batch(batch)
        if control is not None:
            check_inputs(control, config)
        start = cache.length if cache is not None else 0
        if start + tokens > config.context_length:
            raise UserError(
                f"{start + tokens} tokens do not fit into the model's context of {config.context_length}; "
                "shorten the text or train with a larger context_length"
            )
        segments = find_segments(config, embeddings, input_ids, attention_mask, cache)
        positions = positions_in_segment(segments, cache, start, tokens, embeddings.device)
        mask = attention_mask_of(segments, cache, start, embeddings)
        if self.slider_embedding is not None and control is not None and control.sliders is not None:
            begins = positions == 0 if input_ids is None else (positions == 0) | (input_ids == config.separator_id)
            embeddings = self.slider_embedding(embeddings, control.sliders, begins)
        x = embeddings
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        rotation = None if config.positions == "learned" else rotary_tables(positions, config, x.dtype)

        adapters: Adapters | None = None
        if self.slider_adapters is not None and control is not None and control.sliders is not None:
            adapters = self.slider_adapters(control.sliders)

        collected: dict[str, list[Tensor]] = {}
        served: list[Factors] = []
        context = origin = None
        for index, layer in enumerate(self.layers):
            if self.controller is not None and index in self.controller.taps:
                assert self.layout is not None
                # the controller of tap 0 reads the embeddings themselves, without positions
                tapped = embeddings if index == 0 else x
                raw, context = self.controller(index, tapped, segments, cache, control, context)
                signals = self.layout.split(raw)
                if frozen:
                    signals = {name: freeze(name, signal, frozen, index) for name, signal in signals.items()}
                for name, signal in signals.items():
                    collected.setdefault(name, []).append(signal)
                served, first = layer_factors(signals, dtype=None if torch.is_grad_enabled() else x.dtype), index
            factors = served[index - first] if served else UNMODULATED
            if factors.residual is not None:
                if origin is None:  # x̂₀, from what enters the first layer, which tap 0 always serves
                    origin = F.rms_norm(x, (config.d_model,), eps=config.norm_eps)
                x = add_scaled(x, origin, factors.residual)
            arguments = (x, factors, rotation, mask, cache, adapters)
            recompute = self.checkpointing and cache is None and torch.is_grad_enabled()
            x = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        x = adapted(x, adapters, -1)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x), {
            name: parts[0] if len(parts) == 1 else torch.cat(parts, 2) for name, parts in collected.items()
        }

    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.embedding.weight.dtype
        write_tensors(folder / WEIGHTS, {name: tensor.to(dtype) for name, tensor in self.state_dict().items()})
        # Last, because a folder without it is no model: a kill in between leaves nothing that looks complete.
        write_json(folder / CONFIG, saved_config(self.config, str(dtype).removeprefix("torch.")))


def _normal_matrix(seed: int, name: str, shape: torch.Size, gated: bool) -> Tensor:
    """Standard normal numbers for the matrix `name`, on CPU; those of a unit of a feed-forward block do not depend on
    how many units there are. `gated`: the rows are all units' gates, then all units' values."""
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, own])))
    rows, columns = shape
    if name.endswith("ffn.down.weight"):
        return torch.from_numpy(generator.standard_normal((columns, rows), np.float32)).T
    drawn = torch.from_numpy(generator.standard_normal((rows, columns), np.float32))
    return drawn.view(-1, 2, columns).transpose(0, 1).flatten(0, 1) if gated else drawn
