"""The published NCN architecture, read from its own parameters and run as it runs, for comparison only.

It exists to measure against. Its two modes do not agree with each other, and one of them is not a language model:

- **Whole sequence**, `old(input_ids)`: the controller pools over *all* tokens of the call, later ones included, so a
  changed future token changes past logits. The first such call on a model warns (`NonCausalWarning`).
- **Stepwise**, `old(next_ids, past=out.past)`: the controller pools over each new token alone, as in the published
  decoding. This is causal. A first call with one token has no later token to see, so it is already stepwise;
  `old(input_ids, past=old.start(batch_size))` computes every step of a whole text at once.

Neither mode can be trained. The rest of the package has nothing in common with this file but the ideas.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor, nn

from ncn.errors import UserError

SIGNALS = ("gain", "precision", "ffn_gate")


class NonCausalWarning(UserWarning):
    """The whole-sequence mode was used: its logits depend on later tokens."""


class PublishedConfig(BaseModel):
    """Configuration of the published model, under its own names; every key is required and no other is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: PositiveInt
    d_model: PositiveInt
    nhead: PositiveInt
    num_layers: PositiveInt
    dim_feedforward: PositiveInt
    max_position_embeddings: PositiveInt
    layer_norm_eps: PositiveFloat
    ncn_hidden_dim: PositiveInt
    ncn_heads: PositiveInt
    homeostatic_lambda: float = Field(ge=0)
    tie_weights: bool

    @model_validator(mode="after")
    def _can_be_built(self) -> PublishedConfig:
        for name, heads in (("nhead", self.nhead), ("ncn_heads", self.ncn_heads)):
            if self.d_model % heads:
                raise ValueError(f"d_model {self.d_model} does not divide into {name} {heads}; correct one of them")
        if not self.tie_weights:
            raise ValueError("tie_weights is false, but only a model whose output head is its embedding can be read")
        return self


@dataclass(frozen=True)
class Past:
    """Keys and values of every layer for the tokens seen so far. A step makes a new one and leaves this one alone."""

    keys: Float[Tensor, "layers batch heads past head_dim"]
    values: Float[Tensor, "layers batch heads past head_dim"]

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return self.keys.shape[3]


@dataclass(frozen=True)
class PublishedOutput:
    """What a call computes for its own tokens, and the `past` with which the next call goes on."""

    logits: Float[Tensor, "batch tokens vocabulary"]
    signals: dict[str, Float[Tensor, "batch tokens layers"]]
    homeostatic_loss: Float[Tensor, ""]
    past: Past


class _Controller(nn.Module):
    """Embeddings plus attention-pooled embeddings, normalised, through a tanh layer to three numbers a layer."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.control_query = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.pooling_attn = nn.MultiheadAttention(config.d_model, config.ncn_heads, batch_first=True)
        self.ncn_norm = nn.RMSNorm(config.d_model, config.layer_norm_eps)
        self.layer1 = nn.Linear(config.d_model, config.ncn_hidden_dim)
        self.layer2 = nn.Linear(config.ncn_hidden_dim, len(SIGNALS) * config.num_layers)

    def forward(
        self, embeddings: Float[Tensor, "batch tokens d_model"], stepwise: bool
    ) -> dict[str, Float[Tensor, "batch tokens layers"]]:
        # Stepwise, every token is a whole sequence to the pooling.
        sequences = embeddings.flatten(0, 1).unsqueeze(1) if stepwise else embeddings
        query = self.control_query.expand(len(sequences), -1, -1)
        pooled, _ = self.pooling_attn(query, sequences, sequences, need_weights=False)
        state = (sequences + pooled).view_as(embeddings)
        raw = self.layer2(torch.tanh(self.layer1(self.ncn_norm(state))))
        # The signals of one layer lie side by side.
        gain, precision, ffn_gate = raw.unflatten(-1, (-1, len(SIGNALS))).unbind(-1)
        return {
            "gain": 2 * torch.sigmoid(gain),
            "precision": (F.softplus(precision) + 0.01).clamp(max=4),
            "ffn_gate": torch.sigmoid(ffn_gate),
        }


class _Attention(nn.Module):
    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.num_heads = config.nhead
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, precision: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal attention of x over the past and itself; also the keys and values up to here."""
        queries, keys, values = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = queries * precision[:, None, :, None]  # precision multiplies the attention scores
        keys = torch.cat([past_keys, keys], dim=2)
        values = torch.cat([past_values, values], dim=2)
        new, total = queries.shape[2], keys.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), keys, values


class _Layer(nn.Module):
    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(config.d_model, config.dim_feedforward),
                gelu=nn.GELU(),
                linear2=nn.Linear(config.dim_feedforward, config.d_model),
            )
        )

    def forward(
        self, x: Tensor, gain: Tensor, precision: Tensor, ffn_gate: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer; every signal is (batch, tokens). Also this layer's keys and values up to here."""
        gain, ffn_gate = gain[..., None], ffn_gate[..., None]
        attended, keys, values = self.self_attn(self.norm1(x), precision, past_keys, past_values)
        x = x + gain * attended
        x = x + gain * ffn_gate * self.feed_forward(self.norm2(x))
        return x, keys, values


class PublishedNCN(nn.Module):
    """The published model under its own parameter names. Made by `load`; it runs, and refuses to be trained."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.ncn = _Controller(config)
        self.transformer_layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.layer_norm_eps)
        self.output_head = nn.Linear(config.d_model, config.vocab_size, bias=False)  # also the token embedding
        self._announced = False
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PublishedNCN:
        """Refuses training mode with a `UserError`; `eval()` is always on."""
        if mode:
            raise UserError("the published model is for comparison and cannot be trained; train a ModulatedTransformer")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> PublishedNCN:
        """Refuses gradients with a `UserError`."""
        if requires_grad:
            raise UserError("the published model is for comparison and has no gradients; train a ModulatedTransformer")
        return super().requires_grad_(False)

    def start(self, batch_size: int = 1) -> Past:
        """The past of `batch_size` sequences before their first token, to go stepwise from the beginning."""
        head_dim = self.config.d_model // self.config.nhead
        empty = self.output_head.weight.new_empty(self.config.num_layers, batch_size, self.config.nhead, 0, head_dim)
        return Past(empty, empty)

    def forward(self, input_ids: Int[Tensor, "batch tokens"], past: Past | None = None) -> PublishedOutput:
        """Logits, signals and homeostatic loss of `input_ids`; stepwise after `past`, else the whole sequence at once.

        Whole sequence, the controller sees all of `input_ids` at every position and the model's first call with more
        than one token warns (`NonCausalWarning`). Stepwise, it sees each token alone, so several tokens in one call
        are the same as one at a time. `homeostatic_loss` is over the tokens of this call, with the weight
        `homeostatic_lambda` in it: λ Σ_signals mean((signal − 1)²), the mean over batch, tokens and layers.

        Raises `UserError` for ids outside the vocabulary, more tokens than there are positions, no tokens, and a
        past of another batch size or another model.
        """
        stepwise = past is not None
        past = past if past is not None else self.start(len(input_ids))
        self._check(input_ids, past)
        tokens = input_ids.shape[1]
        if not stepwise and tokens > 1 and not self._announced:
            warnings.warn(
                "the published whole-sequence mode is not causal: its logits see later tokens, so its loss is not "
                "a language model's; old(input_ids, past=old.start(batch_size)) is its causal decoding",
                NonCausalWarning,
                stacklevel=4,  # the caller, beyond this frame and two of nn.Module's
            )
            self._announced = True

        with torch.no_grad():
            positions = torch.arange(past.length, past.length + tokens, device=input_ids.device)
            x = F.embedding(input_ids, self.output_head.weight) + self.position_embeddings(positions)
            signals: dict[str, Tensor] = self.ncn(x, stepwise)
            keys, values = list(past.keys), list(past.values)
            for index, layer in enumerate(self.transformer_layers):
                of_layer = {name: signal[..., index] for name, signal in signals.items()}
                x, keys[index], values[index] = layer(x, past_keys=keys[index], past_values=values[index], **of_layer)
            logits = self.output_head(self.final_norm(x))
            deviation = torch.stack([(signal - 1).square().mean() for signal in signals.values()]).sum()
        return PublishedOutput(
            logits, signals, self.config.homeostatic_lambda * deviation, Past(torch.stack(keys), torch.stack(values))
        )

    def _check(self, input_ids: Tensor, past: Past) -> None:
        batch, tokens = input_ids.shape
        vocab_size, positions = self.config.vocab_size, self.config.max_position_embeddings
        if input_ids.numel() == 0:
            raise UserError(f"input_ids of shape {(batch, tokens)} hold no token; give at least one")
        if past.length + tokens > positions:
            raise UserError(f"{past.length} past + {tokens} new tokens exceed {positions} positions; shorten the text")
        outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if outside.numel():
            raise UserError(f"token id {outside[0]} is outside 0 to {vocab_size - 1}; use this model's tokenizer")
        if past.keys.shape[1] != batch:
            raise UserError(f"past holds {past.keys.shape[1]} sequences but input_ids {batch}; step the same batch")
        ours = self.start(batch).keys
        if (past.keys[..., :0, :].shape, past.keys.dtype) != (ours.shape, ours.dtype):
            raise UserError("past comes from a model of another shape or dtype; use this model's own out.past")


def load(state_dict: Mapping[str, object], config: Mapping[str, object]) -> PublishedNCN:
    """The published model that `state_dict` and `config` describe, in the dtype and on the device of its tensors.

    Parameters carry their published names. Where names start with "param.", those are the parameters, and tensors
    beside them are ignored. A second copy of the tied output head, which a checkpoint may hold as the token
    embedding, is accepted under any name. The tensors are copied.

    Raises `UserError` for missing, unexpected or wrongly shaped parameters and for a config with missing, unknown or
    impossible keys.
    """
    with torch.device("meta"):
        model = PublishedNCN(_read_config(config))
    expected = model.state_dict()

    prefixed = {name[6:]: value for name, value in state_dict.items() if name.startswith("param.")}
    state_dict = prefixed or state_dict
    given = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if others := sorted(state_dict.keys() - given.keys()):
        raise UserError(f"state_dict holds {others[0]!r}, which is not a tensor; pass the parameters themselves")
    if missing := sorted(expected.keys() - given.keys()):
        raise UserError(f"state_dict lacks {_listed(missing)}; check num_layers, and that it is a published NCN's")
    head = given["output_head.weight"]
    unexpected = [name for name in sorted(given.keys() - expected.keys()) if not torch.equal(given[name], head)]
    if unexpected:
        raise UserError(f"state_dict holds the unexpected {_listed(unexpected)}; check num_layers, or remove them")
    for name, parameter in expected.items():
        if given[name].shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(given[name].shape)}, but the config asks for {tuple(parameter.shape)}; "
                "give the config that the checkpoint was trained with"
            )
    model.load_state_dict({name: given[name].detach().to(head, copy=True) for name in expected}, assign=True)
    return model


def _read_config(config: Mapping[str, object]) -> PublishedConfig:
    try:
        return PublishedConfig.model_validate(dict(config))
    except ValidationError as error:
        faults = [".".join(map(str, fault["loc"])) + ": " + fault["msg"] for fault in error.errors()]
        faults = [fault.removeprefix(": Value error, ") for fault in faults]
        keys = ", ".join(PublishedConfig.model_fields)
        raise UserError(f"published config: {'; '.join(faults)} (its keys are {keys})") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
