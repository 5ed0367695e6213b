"""The contracts as plain functions: each raises AssertionError where a model breaks it.

A model is called as `ModulatedTransformer` is; another one is checked by handing over something that is called so too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from ncn.config.model import NCNConfig
from ncn.config.signals import SIGNALS
from ncn.core.cache import Cache
from ncn.core.model import ModulatedTransformer
from ncn.core.reference import reference

EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""How closely the same function must agree with itself in float64, when sums are taken in another order."""


# Causality


def later_tokens_change_nothing(logits: Callable[[Tensor], Tensor], input_ids: Tensor, after: Sequence[int]) -> None:
    """Whatever follows position t, documents that begin there included, the logits up to t are the same bits."""
    before = logits(input_ids)
    others = int(input_ids.max()) + 1
    for t in after:
        for shift in (1, others // 2):
            changed = input_ids.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + shift) % others
            other = logits(changed)
            assert torch.equal(other[:, : t + 1], before[:, : t + 1]), f"tokens after {t} change what came before"
            assert not torch.equal(other[:, t + 1 :], before[:, t + 1 :]), "the model does not read its input"


def later_embeddings_have_no_gradient(
    logits: Callable[[Tensor], Tensor], embeddings: Tensor, after: Sequence[int]
) -> None:
    """The logits at t, differentiated by the embeddings behind t, give exactly zero; by the one at t they do not."""
    embeddings = embeddings.detach().requires_grad_()
    result = logits(embeddings)
    for t in after:
        (gradient,) = torch.autograd.grad(result[:, t].square().sum(), embeddings, retain_graph=True)
        assert gradient[:, t].abs().amax() > 0
        assert gradient.isfinite().all()
        assert gradient[:, t + 1 :].abs().sum() == 0, f"the logits at {t} depend on later embeddings"


# One function


def in_pieces(model: nn.Module, input_ids: Tensor, cuts: Sequence[int], cache: Cache, mask: Tensor | None) -> Tensor:
    ends = [*cuts, input_ids.shape[1]]
    logits = []
    for start, end in zip([0, *cuts], ends, strict=True):
        part = None if mask is None else mask[:, start:end]
        logits.append(model(input_ids[:, start:end], part, cache=cache).logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def pieces_equal_the_whole(
    model: nn.Module, input_ids: Tensor, cuts: Sequence[int], cache: type[Cache] = Cache
) -> None:
    """A sequence fed in pieces through a cache gives the logits of one pass, and the last alone when that is asked."""
    whole = model(input_ids).logits
    held = cache()
    assert_close(in_pieces(model, input_ids, cuts, held, None), whole, **EXACT)
    assert held.length == input_ids.shape[1]
    assert_close(model(input_ids, last_only=True).logits, whole[:, -1:], **EXACT)


@torch.no_grad()
def padding_on_the_left_changes_nothing(
    model: nn.Module, input_ids: Tensor, padding: Sequence[int], cuts: Sequence[int], cache: type[Cache] = Cache
) -> None:
    """Unequal lengths in one batch, padded on the left, give the logits of each alone: at once and in pieces."""
    batch, tokens = input_ids.shape
    mask = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    at_once = model(input_ids, mask).logits
    continued = in_pieces(model, input_ids, cuts, cache(), mask)
    unmasked_after = cache()  # decoding: a mask for the prompt, none for what follows
    first = model(input_ids[:, : cuts[-1]], mask[:, : cuts[-1]], cache=unmasked_after).logits
    rest = model(input_ids[:, cuts[-1] :], cache=unmasked_after).logits
    assert max(padding) < cuts[-1]
    for row in range(batch):
        alone = model(input_ids[row : row + 1, padding[row] :]).logits[0]
        for logits in (at_once, continued, torch.cat([first, rest], 1)):
            assert logits.isfinite().all()
            assert_close(logits[row, padding[row] :], alone, **EXACT)


@torch.no_grad()
def beams_keep_their_pasts(model: nn.Module, input_ids: Tensor, cut: int, cache: type[Cache] = Cache) -> None:
    """After repeating and reordering the rows of a cache, each row continues the past that it was given."""
    held = cache()
    model(input_ids[:, :cut], cache=held)
    held.repeat(2)
    beams = input_ids[:, :cut].repeat_interleave(2, 0)
    following = input_ids[:, cut:].flip(0).repeat_interleave(2, 0)
    order = torch.tensor([3, 3, 0, 2])
    for start, end in ((0, 1), (1, following.shape[1])):
        beams = torch.cat([beams, following[:, start:end]], 1)
        logits = model(following[:, start:end], cache=held).logits
        assert_close(logits, model(beams).logits[:, cut + start :], **EXACT)
        held.reorder(order)
        beams = beams[order]


@torch.no_grad()
def a_cropped_cache_forgets(
    model: nn.Module, input_ids: Tensor, lengths: Sequence[int], cache: type[Cache] = Cache
) -> None:
    """After cropping, a cache continues as if the tokens that were cut off had never been."""
    whole = model(input_ids).logits
    tokens = input_ids.shape[1]
    wrong = input_ids.roll(1, 0).flip(1)
    for length in lengths:
        held = cache()
        model(torch.cat([input_ids[:, :length], wrong[:, length:]], 1), cache=held)
        held.crop(length)
        rest = in_pieces(model, input_ids[:, length:], [1], held, None) if length < tokens - 1 else None
        if rest is not None:
            assert_close(rest, whole[:, length:], **EXACT)
        held.crop(-1)
        assert_close(model(input_ids[:, -1:], cache=held).logits, whole[:, -1:], **EXACT)


# Neutral start


@torch.no_grad()
def starts_neutral(
    config: NCNConfig, input_ids: Tensor, build: Callable[[NCNConfig], nn.Module] = ModulatedTransformer
) -> None:
    """Before training the model computes, bit for bit, what it computes without a controller; also after a reset."""

    def seeded(config: NCNConfig) -> nn.Module:
        torch.manual_seed(7)
        return build(config)

    with_controller, without = seeded(config), seeded(config.override(controller=None))
    for _ in range(2):
        for dtype in (torch.float64, torch.float32):
            with_controller.to(dtype), without.to(dtype)
            assert torch.equal(with_controller(input_ids).logits, without(input_ids).logits), dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(with_controller(input_ids).logits, without(input_ids).logits), "autocast"
        for name, signal in with_controller(input_ids, output_signals=True).signals.items():
            assert (signal == SIGNALS[name].neutral).all(), name
        for parameter in with_controller.parameters():
            parameter.add_(1)
        for model in (with_controller, without):
            torch.manual_seed(8)
            model.reset_parameters()


# Effect


def neutral_signals(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """One neutral value for every signal and site, shape (1, 1, layers[, sites])."""
    signals = model(input_ids, output_signals=True).signals
    return {name: torch.full_like(signal[:1, :1], SIGNALS[name].neutral) for name, signal in signals.items()}


def every_signal_acts(model: nn.Module, input_ids: Tensor) -> None:
    """Holding one site of one layer's signal at another value changes the logits, and differs from site to site."""
    with torch.no_grad():
        neutral = neutral_signals(model, input_ids)
        assert neutral
        base = model(input_ids, frozen=neutral).logits
        seen = [base]
        for index, (name, values) in enumerate(neutral.items()):
            for site in range(values.numel()):
                other = values.clone()
                other.view(-1)[site] = 0.5 + index / 50  # gain and gate of one site multiply the same output
                logits = model(input_ids, frozen=neutral | {name: other}).logits
                assert all((logits - earlier).abs().max() > 1e-6 for earlier in seen), f"{name} {site} has no effect"
                seen.append(logits)


def every_signal_learns(model: nn.Module, input_ids: Tensor) -> None:
    """Each raw output of the signal source has a gradient: every row of its last weights, every entry of its biases."""
    model.zero_grad()
    loss, _ = model.loss(input_ids[:, :-1], input_ids[:, 1:])
    loss.backward()
    last = ("output.weight", "output.bias", "raw", "weight", "bias")
    checked = 0
    for name, parameter in model.named_parameters():
        network = name.startswith("controller.networks.")
        if not name.startswith("controller.") or not name.endswith(last[:2] if network else last[2:]):
            continue
        sites = parameter.grad.flatten(1).abs().amax(1) if name.endswith("weight") else parameter.grad.flatten().abs()
        assert (sites > 0).all(), f"{name} has outputs without a gradient"
        checked += len(sites)
    assert checked


@torch.no_grad()
def precision_is_inverse_temperature(model: nn.Module, input_ids: Tensor, monkeypatch) -> None:
    """With precision β the attention is softmax(β q·k/√d): what a manual attention over the neutral queries gives."""
    neutral = neutral_signals(model, input_ids)
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    fused = F.scaled_dot_product_attention

    def recording(queries: Tensor, keys: Tensor, values: Tensor, **options: object) -> Tensor:
        result = fused(queries, keys, values, **options)
        seen.append((queries, keys, values, result))
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    beta = 1 + torch.rand_like(neutral["precision"])
    for layer in range(neutral["precision"].shape[2]):
        changed = neutral["precision"].clone()
        changed[:, :, layer] = beta[:, :, layer]
        seen.clear()
        model(input_ids, frozen=neutral)
        queries, keys, values, _ = seen[layer]
        seen.clear()
        model(input_ids, frozen=neutral | {"precision": changed})
        attended = seen[layer][-1]
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5
        scores = scores * beta[0, 0, layer].view(-1, 1, 1)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        assert_close(attended, scores.softmax(-1) @ values, **EXACT)


# Truth


def equals_the_equations(model: nn.Module, input_ids: Tensor, mask: Tensor | None = None) -> None:
    """Logits, signals, homeostatic loss and the gradient of every parameter are those of the reference."""
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    fast, slow = model(input_ids, mask, output_signals=True), reference(model, input_ids, mask)
    assert_close(fast.logits[kept], slow.logits[kept], **EXACT)
    assert fast.signals.keys() == slow.signals.keys()
    directions = torch.Generator().manual_seed(3)
    totals = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    pairs = [(fast.logits, slow.logits), *((fast.signals[name], slow.signals[name]) for name in slow.signals)]
    for one, other in pairs:
        assert one.shape == other.shape
        assert_close(one[kept], other[kept], **EXACT)
        direction = torch.randn(one[kept].shape, generator=directions, dtype=torch.float64)
        totals = [totals[0] + (one[kept] * direction).sum(), totals[1] + (other[kept] * direction).sum()]
    if mask is None:
        assert_close(fast.homeostatic_loss, slow.homeostatic_loss, **EXACT)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(total, parameters, materialize_grads=True) for total in totals]
    for name, one, other in zip(names, *gradients, strict=True):
        assert other.abs().amax() > 0, f"the reference does not use {name}"
        assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"gradient of {name}: {text}")


# Documents


def documents_are_apart(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """A document's logits and signals are those that it has alone, and nothing flows back into the one before."""
    together = torch.cat([first, second], 1)
    size = first.shape[1]
    out, alone = model(together, output_signals=True), model(second, output_signals=True)
    assert_close(out.logits[:, size:], alone.logits, **EXACT)
    for name, signal in alone.signals.items():
        assert_close(out.signals[name][:, size:], signal, **EXACT)
    embeddings = model.embedding(together).detach().requires_grad_()
    hidden, _ = model.hidden_states(embeddings, together)
    hidden[:, size:].square().sum().backward()
    assert embeddings.grad[:, :size].abs().sum() == 0
    assert embeddings.grad[:, size:].abs().sum() > 0


@torch.no_grad()
def documents_see_each_other(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """Without a border every token's logits depend on the document before."""
    joined = model(torch.cat([first, second], 1)).logits[:, first.shape[1] :]
    assert ((joined - model(second).logits).abs().amax(-1) > 1e-6).all()
