"""The equations as they are written, one number or vector at a time: slow, exact, and without a line of the fast path.

Tests hold the fast path against it, and readers who want to know what is computed start here. It shares nothing with
the other modules but the configuration and the parameters, runs in float64, and is differentiable in every parameter.
A document is computed alone: that *is* what separated documents and padding mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.types import ControlInputs, Logits, Signal, TokenIds

Vectors = list[Tensor]
"""One vector for each token of a document."""
Weights = Mapping[str, Tensor]


@dataclass
class Reference:
    """What the equations give. Padding has zeros, and does not enter the homeostatic loss."""

    logits: Logits
    signals: dict[str, Signal]
    homeostatic_loss: Float[Tensor, ""]


def reference(
    model: nn.Module,
    input_ids: TokenIds,
    attention_mask: Bool[Tensor, "batch tokens"] | None = None,
    control: ControlInputs | None = None,
) -> Reference:
    """Logits and signals of a `ModulatedTransformer`, from its configuration and its parameters alone."""
    config = model.config
    assert isinstance(config, NCNConfig)
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    batch, tokens = input_ids.shape
    logits = torch.zeros(batch, tokens, config.vocab_size, dtype=torch.float64)
    signals: dict[str, Tensor] = {}
    for row in range(batch):
        real = [t for t in range(tokens) if attention_mask is None or attention_mask[row, t]]
        for places in _documents(config, input_ids[row].tolist(), real):
            given = [_at(control, row, t) for t in places]
            hidden, sent = _document(config, weights, [int(input_ids[row, t]) for t in places], given)
            for t, h in zip(places, hidden, strict=True):
                logits[row, t] = weights["embedding.weight" if config.tie_embeddings else "head.weight"] @ h
            for layer, by_token in enumerate(sent):
                for t, values in zip(places, by_token, strict=True):
                    for name, value in values.items():
                        shape = (batch, tokens, config.num_layers, *value.shape)
                        signals.setdefault(name, torch.zeros(shape, dtype=torch.float64))[row, t, layer] = value
    kept = torch.ones(batch, tokens, dtype=torch.bool) if attention_mask is None else attention_mask
    homeostasis = torch.zeros((), dtype=torch.float64)
    for name, signal in signals.items():
        neutral = 0 if name == "residual_mix" else 1
        homeostasis = homeostasis + ((signal[kept] - neutral) ** 2).mean()  # (6)
    return Reference(logits, signals, homeostasis)


def _at(control: ControlInputs | None, row: int, t: int) -> ControlInputs:
    """What is given at one token, an instruction in its pooled form."""
    parts = control or ControlInputs()
    here = (part[row % len(part), t % part.shape[1]] if isinstance(part, Tensor) else None for part in parts)
    return ControlInputs(*here)


def _documents(config: NCNConfig, ids: list[int], real: list[int]) -> list[list[int]]:
    """The positions of each document; all real positions form one where documents are not kept apart."""
    documents: list[list[int]] = []
    for t in real:
        if not documents or (not config.cross_documents and ids[t] == config.separator_id):
            documents.append([])
        documents[-1].append(t)
    return documents


def _document(
    config: NCNConfig, weights: Weights, ids: list[int], given: list[ControlInputs]
) -> tuple[Vectors, list[list[dict[str, Tensor]]]]:
    """Final hidden states, and the signals by layer and token."""
    embeddings = [
        weights["embedding.weight"][token]
        + _slider_embedding(config, weights, t == 0 or token == config.separator_id, at)
        for t, (token, at) in enumerate(zip(ids, given, strict=True))
    ]
    x = list(embeddings)
    if config.positions == "learned":
        x = [e + weights["position_embedding.weight"][t] for t, e in enumerate(embeddings)]
    first_hat = [_rms_norm(h, config) for h in x]
    raw: list[Vectors] = []
    sent = []
    for layer in range(config.num_layers):
        tapped = embeddings if layer == 0 else x  # (3): tap 0 reads the embeddings
        raw += _raw_signals(config, weights, layer, tapped, embeddings, given)
        signals = [_split(config, raw[layer][t]) if raw else {} for t in range(len(ids))]
        x = [h + signals[t].get("residual_mix", 0) * first_hat[t] for t, h in enumerate(x)]  # x ← x + μ x̂₀, (5)
        x = _layer(config, weights, layer, x, signals, given)
        sent.append(signals)
    x = _adapted(config, weights, 2 * config.num_layers, x, given)
    return [_rms_norm(h, config) * weights["norm.weight"] for h in x], sent


def _layer(
    config: NCNConfig,
    weights: Weights,
    layer: int,
    x: Vectors,
    signals: list[dict[str, Tensor]],
    given: list[ControlInputs],
) -> Vectors:
    """Equation (5)."""
    x = _adapted(config, weights, 2 * layer, x, given)
    own = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
    one = torch.ones((), dtype=torch.float64)
    normed = [_filmed(_rms_norm(h, config) * own["attention_norm.weight"], signals[t], 0) for t, h in enumerate(x)]
    attended = _attention(config, own, normed, signals)
    gains = [signals[t].get("gain", one).expand(2) for t in range(len(x))]
    middles = [h + gains[t][0] * attended[t] for t, h in enumerate(x)]  # x' = x + g · Attn(Norm x; β)
    result = []
    for t, middle in enumerate(_adapted(config, weights, 2 * layer + 1, middles, given)):
        gate = signals[t].get("ffn_gate", one)
        normed_middle = _filmed(_rms_norm(middle, config) * own["ffn_norm.weight"], signals[t], 1)
        written = _feed_forward(config, own, normed_middle)
        result.append(middle + gains[t][1] * gate * written)  # x'' = x' + g · γ · FFN(Norm x')
    return result


def _filmed(x: Tensor, signals: dict[str, Tensor], norm: int) -> Tensor:
    """Each group of channels scaled by its own number of the layer's norm, (4)."""
    if "norm_film" not in signals:
        return x
    scales = signals["norm_film"].chunk(2)[norm]
    return torch.cat([s * group for s, group in zip(scales, x.chunk(len(scales)), strict=True)])


def _attention(config: NCNConfig, own: Weights, x: Vectors, signals: list[dict[str, Tensor]]) -> Vectors:
    """Softmax attention, head by head; β multiplies the query, the head gate what the head has read."""
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_dim
    queries, keys, values = [], [], []
    for t, h in enumerate(x):
        qkv = (own["attention.qkv.weight"] @ h).view(-1, width)
        q, k, v = qkv[:heads], qkv[heads : heads + kv_heads], qkv[heads + kv_heads :]
        queries.append([_placed(config, own, "query_norm", head, t) for head in q])
        keys.append([_placed(config, own, "key_norm", head, t) for head in k])
        values.append(list(v))
    result = []
    for t in range(len(x)):
        outputs = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            query = queries[t][head]
            if "precision" in signals[t]:
                beta = signals[t]["precision"]
                query = (beta if beta.ndim == 0 else beta[head]) * query  # q ← β q, (4)
            scores = [query @ keys[s][shared] / math.sqrt(width) for s in range(t + 1)]
            shares = _softmax(scores)
            read = _sum([share * values[s][shared] for s, share in enumerate(shares)])
            outputs.append(signals[t]["head_gate"][head] * read if "head_gate" in signals[t] else read)  # (4)
        result.append(own["attention.output.weight"] @ torch.cat(outputs))
    return result


def _placed(config: NCNConfig, own: Weights, norm: str, x: Tensor, position: int) -> Tensor:
    """A head's query or key after QK-norm and rotation: the pair (i, i + width/2) turns by position · θ^(−2i/width)."""
    if config.qk_norm:
        x = _rms_norm(x, config) * own[f"attention.{norm}.weight"]
    if config.positions == "learned":
        return x
    half = config.head_dim // 2
    turned = [x[i] for i in range(2 * half)]
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / config.head_dim)
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(turned)


def _feed_forward(config: NCNConfig, own: Weights, x: Tensor) -> Tensor:
    inner = own["ffn.up.weight"] @ x
    if config.activation == "swiglu":
        gate, value = inner[: config.ffn_width], inner[config.ffn_width :]
        inner = gate / (1 + torch.exp(-gate)) * value
    else:
        inner = _gelu(inner)
    return own["ffn.down.weight"] @ inner


def _raw_signals(
    config: NCNConfig, weights: Weights, layer: int, hidden: Vectors, embeddings: Vectors, given: list[ControlInputs]
) -> list[Vectors]:
    """z of every layer that is served from here on, for each token; empty where the layer is no tap (3)."""
    controller = config.controller
    if controller is None:
        return []
    if controller.kind == "static":
        return [[weights["controller.raw"][layer] for _ in hidden]]
    if controller.kind == "local":
        weight, bias = (weights[f"controller.readouts.{layer}.{part}"] for part in ("weight", "bias"))
        return [[weight @ _rms_norm(h, config) + bias for h in hidden]]
    taps = controller.taps_in(config.num_layers)
    if layer not in taps:
        return []
    served = min([tap for tap in taps if tap > layer], default=config.num_layers) - layer
    own = _network(weights, layer)
    pooling = (own, hidden) if controller.pooling == "every" else (_network(weights, 0), embeddings)
    by_token = []
    for t in range(len(hidden)):
        pooled = _pooled(config, *pooling, t)
        by_token.append(_controller(config, own, hidden, t, pooled, given[t]).chunk(served))
    return [[groups[i] for groups in by_token] for i in range(served)]


def _network(weights: Weights, tap: int) -> Weights:
    prefix = f"controller.networks.{tap}."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _pooled(config: NCNConfig, own: Weights, hidden: Vectors, t: int) -> Tensor:
    """Equation (1) at token t."""
    controller = config.controller
    assert controller is not None
    pools, width = controller.pooling_heads, controller.width
    read = [own["read.weight"] @ _rms_norm(hidden[s], config) for s in range(t + 1)]
    pooled = []
    for p in range(pools):
        values = slice(pools + p * (width // pools), pools + (p + 1) * (width // pools))
        decay = torch.exp(own["log_decay"][p])
        logarithms = []
        for s in range(t + 1):
            a = read[s][p] / math.sqrt(config.d_model)  # (1): a = k · RMSNorm(e) / √D
            logarithms.append(a - decay * (t - s))  # (1): w = exp(a − ρ (t − s))
        shares = _softmax(logarithms)
        pooled.append(_sum([share * read[s][values] for s, share in enumerate(shares)]))  # (1): c = Σ w v / Σ w
    return torch.cat(pooled)


def _controller(
    config: NCNConfig, own: Weights, hidden: Vectors, t: int, pooled: Tensor, given: ControlInputs
) -> Tensor:
    """Equation (2) at token t."""
    controller = config.controller
    assert controller is not None
    u = pooled
    if controller.phasic:
        local = own["read.weight"][-controller.width :]  # the last rows of what is read
        for age in range(min(controller.phasic_kernel, t + 1)):
            read = local @ _rms_norm(hidden[t - age], config)
            u = u + own["phasic_filter"][age] * read  # φ: the last few tokens
    if given.sliders is not None and controller.sliders_enter == "controller":  # κ
        u = u + own["external.sliders.weight"] @ _known_values(given.sliders)
    if given.tasks is not None and given.tasks >= 0:
        u = u + own["external.tasks.weight"][int(given.tasks)]
    if isinstance(given.instruction, Tensor):
        u = u + own["external.instruction.weight"] @ _rms_norm(given.instruction, config)
    u = _rms_norm(u, config) * own["input_norm.weight"]  # (2): u = RMSNorm(c + φ + κ)
    inner = torch.tanh(own["expand.weight"] @ u + own["expand.bias"])
    z = own["output.weight"] @ inner + own["output.bias"]
    if given.sliders is not None and controller.sliders_enter == "controller":
        z = z + own["external.straight.weight"] @ _known_values(given.sliders)
    return z  # (2): z = W₂ tanh(W₁ u + b₁) + b₂ + W₃ s


def _slider_embedding(config: NCNConfig, weights: Weights, begins: bool, given: ControlInputs) -> Tensor:
    """What sliders add to an embedding where they do not enter the controller: to every one, or a document's first."""
    enter = config.controller.sliders_enter if config.controller else "controller"
    if given.sliders is None or enter in ("controller", "layers") or (enter == "prefix" and not begins):
        return torch.zeros(config.d_model, dtype=torch.float64)
    return weights["slider_embedding.weight"] @ _known_values(given.sliders)


def _adapted(config: NCNConfig, weights: Weights, place: int, x: Vectors, given: list[ControlInputs]) -> Vectors:
    """What sliders add to the residual stream where they enter the layers: W s + U (φ(V x̂ + C s) − φ(V x̂))."""
    if config.controller is None or config.controller.sliders_enter != "layers":
        return x
    result = []
    for h, at in zip(x, given, strict=True):
        if at.sliders is not None:
            s = _known_values(at.sliders)
            h_hat = _rms_norm(h, config)
            added = weights["slider_adapters.direction"][place] @ s
            for unit in range(config.controller.slider_rank):
                read = weights["slider_adapters.read"][place, unit] @ h_hat
                turned = read + weights["slider_adapters.turn"][place, unit] @ s
                added = added + weights["slider_adapters.write"][place, :, unit] * (_gelu(turned) - _gelu(read))
            h = h + added
        result.append(h)
    return result


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _known_values(sliders: Tensor) -> Tensor:
    """Value and "is set" of each slider, 0 where it is unset."""
    set_to = sliders.tolist()
    known = [not math.isnan(value) for value in set_to]
    around_zero = [2 * value - 1 if is_set else 0.0 for value, is_set in zip(set_to, known, strict=True)]
    return torch.tensor([*around_zero, *map(float, known)], dtype=torch.float64)


def _split(config: NCNConfig, raw: Tensor) -> dict[str, Tensor]:
    """A layer's signals from its part of z, in the configured order (4)."""
    controller = config.controller
    assert controller is not None
    signals: dict[str, Tensor] = {}
    start = 0
    for name in controller.signals:
        per_head = name == "head_gate" or (name == "precision" and controller.precision_per == "head")
        sites = config.num_heads if per_head else 2 if name == "gain" and controller.gain_per == "sublayer" else None
        if name == "norm_film":
            sites = 2 * controller.film_groups
        values = raw[start : start + (sites or 1)]
        signals[name] = _ranged(name, values if sites else values[0], published=controller.maps == "published")
        start += sites or 1
    assert start == len(raw)
    return signals


def _ranged(name: str, z: Tensor, published: bool) -> Tensor:
    """The range maps of (4)."""
    if name == "precision":
        return (torch.log1p(torch.exp(z)) + 0.01).clamp(max=4) if published else 4 ** torch.tanh(z)
    if name == "ffn_gate":
        return _sigmoid(z) if published else _sigmoid(z + 3) * (1 + math.exp(-3))
    if name == "residual_mix":
        return torch.tanh(z)
    return 2 * _sigmoid(z)


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def _rms_norm(x: Tensor, config: NCNConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean() + config.norm_eps)


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    largest = max(score.item() for score in scores)
    powers = [torch.exp(score - largest) for score in scores]
    total = _sum(powers)
    return [power / total for power in powers]


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
