"""Each contract must fail on a model that breaks it: otherwise it protects nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ncn.core.controller.controller as controller_module
import ncn.core.layers as layers_module
import ncn.core.model as model_module
from contracts import properties
from contracts.variants import SEPARATOR, VOCABULARY, awake, config, text, variants
from ncn.config.model import NCNConfig
from ncn.config.signals import SIGNALS
from ncn.core.cache import Cache
from ncn.core.controller.controller import ControllerNetwork
from ncn.core.controller.phasic import convolve
from ncn.core.controller.salience import SalienceState, pool
from ncn.core.layers import Attention
from ncn.core.model import ModulatedTransformer
from ncn.core.signals.modulation import UNMODULATED

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def leaky_pool(patch: Patch) -> None:
    """Salience over the whole sequence, as the published code has it."""

    def leaky(scores, values, decay, segments=None, past=None):
        mean = (scores.softmax(1)[..., None] * values).sum(1, keepdim=True).expand_as(values)
        return SalienceState(scores, mean, segments)

    patch.setattr(controller_module, "pool", leaky)


def pool_one_token_ahead(patch: Patch) -> None:
    def ahead(scores, values, decay, segments=None, past=None):
        return pool(scores.roll(-1, 1), values.roll(-1, 1), decay, segments, past)

    patch.setattr(controller_module, "pool", ahead)


def phasic_one_token_ahead(patch: Patch) -> None:
    def ahead(inputs, filters, segments=None, past=None, past_segments=None):
        return convolve(inputs, filters, segments, past, past_segments) + F.pad(inputs, (0, 0, 0, 1))[:, 1:]

    patch.setattr(controller_module, "convolve", ahead)


def attention_without_a_mask(patch: Patch) -> None:
    fused = F.scaled_dot_product_attention

    def unmasked(queries, keys, values, attn_mask=None, is_causal=False, enable_gqa=False):
        return fused(queries, keys, values, enable_gqa=enable_gqa)

    patch.setattr(F, "scaled_dot_product_attention", unmasked)


def salience_without_past(patch: Patch) -> None:
    patch.setattr(ControllerNetwork, "_past", lambda self, held, cache: None)


def phasic_without_past(patch: Patch) -> None:
    patch.setattr(controller_module, "convolve", lambda inputs, filters, *past: convolve(inputs, filters))


def continued_positions_from_zero(patch: Patch) -> None:
    original = model_module.positions_in_segment
    patch.setattr(
        model_module,
        "positions_in_segment",
        lambda segments, cache, start, tokens, device: original(segments, cache, 0, tokens, device),
    )


def positions_that_count_padding(patch: Patch) -> None:
    patch.setattr(
        model_module,
        "positions_in_segment",
        lambda segments, cache, start, tokens, device: torch.arange(start, start + tokens)[None],
    )


def segments_ignored(patch: Patch) -> None:
    patch.setattr(model_module, "find_segments", lambda *arguments: None)


def segments_ignored_by_the_pool(patch: Patch) -> None:
    def blind(scores, values, decay, segments=None, past=None):
        past = None if past is None else past._replace(segment=None)
        return pool(scores, values, decay, None, past)

    patch.setattr(controller_module, "pool", blind)


def segments_ignored_by_the_phasic_filter(patch: Patch) -> None:
    def blind(inputs, filters, segments=None, past=None, past_segments=None):
        return convolve(inputs, filters, None, past)

    patch.setattr(controller_module, "convolve", blind)


def attention_hook(change: Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]) -> Mutant:
    """A mutant that changes the precision and the head gate on their way to the attention."""

    def mutate(patch: Patch) -> None:
        original = Attention.forward

        def changed(self, x, precision, head_gate, *rest):
            return original(self, x, *change(precision, head_gate), *rest)

        patch.setattr(Attention, "forward", changed)

    return mutate


precision_skipped = attention_hook(lambda precision, gate: (None, gate))
head_gate_skipped = attention_hook(lambda precision, gate: (precision, None))
one_head_skipped = attention_hook(
    lambda precision, gate: (precision, torch.cat([torch.ones_like(gate[..., :1, :]), gate[..., 1:, :]], -2))
)
signals_detached = attention_hook(lambda precision, gate: (precision.detach(), gate.detach()))
precision_on_queries_and_keys = attention_hook(lambda precision, gate: (precision.square(), gate))
precision_upside_down = attention_hook(lambda precision, gate: (1 / precision, gate))


def signal_skipped(name: str) -> Mutant:
    """A mutant whose layers never hear of a signal."""

    def mutate(patch: Patch) -> None:
        original = model_module.layer_factors
        patch.setattr(
            model_module,
            "layer_factors",
            lambda signals, **options: original(
                {other: signal for other, signal in signals.items() if other != name}, **options
            ),
        )

    return mutate


gain_skipped = signal_skipped("gain")
gate_skipped = signal_skipped("ffn_gate")
film_skipped = signal_skipped("norm_film")
mix_skipped = signal_skipped("residual_mix")


def mixed_embeddings(change: Callable[[Tensor], Tensor]) -> Mutant:
    """A mutant that changes what the residual mix adds. (Only this and local gates normalise by torch's function.)"""

    def mutate(patch: Patch) -> None:
        original = F.rms_norm
        patch.setattr(F, "rms_norm", lambda x, shape, eps: change(original(x, shape, eps=eps)))

    return mutate


mix_one_token_ahead = mixed_embeddings(lambda normed: normed.roll(-1, 1))
mix_of_larger_embeddings = mixed_embeddings(lambda normed: 1.01 * normed)
mix_without_gradient = mixed_embeddings(torch.detach)


def last_layer_forgets_its_signals(patch: Patch) -> None:
    original = model_module.layer_factors
    patch.setattr(
        model_module, "layer_factors", lambda *signals, **options: [*original(*signals, **options)[:-1], UNMODULATED]
    )


def slower_decay(patch: Patch) -> None:
    def slower(scores, values, decay, segments=None, past=None):
        return pool(scores, values, 0.99 * decay, segments, past)

    patch.setattr(controller_module, "pool", slower)


def decay_without_gradient(patch: Patch) -> None:
    def constant(scores, values, decay, segments=None, past=None):
        return pool(scores, values, decay.detach(), segments, past)

    patch.setattr(controller_module, "pool", constant)


def rotated_by_neighbours(patch: Patch) -> None:
    """Pairs (2i, 2i + 1) turn instead of (i, i + width/2)."""
    original = layers_module.rotate

    def rotate(x, rotation):
        first, second = original(torch.cat([x[..., ::2], x[..., 1::2]], -1), rotation).chunk(2, -1)
        return torch.stack([first, second], -1).flatten(-2)

    patch.setattr(layers_module, "rotate", rotate)


class SalienceStaysInPlace(Cache):
    """Reorders and repeats keys and values, and forgets that the rows of the salience state move too."""

    def reorder(self, rows: Tensor) -> None:
        kept = {name: buffer for name, buffer in self._slots.items() if name.startswith("tap")}
        super().reorder(rows)
        self._slots |= kept


class SalienceIsNotCropped(Cache):
    """After cropping, the salience state is still that of the whole sequence."""

    def crop(self, length: int) -> None:
        last = {
            name: buffer[:, self.length - 1].clone() for name, buffer in self._slots.items() if name.startswith("tap")
        }
        super().crop(length)
        for name, state in last.items():
            self._slots[name][:, self.length - 1] = state


class PhasicIsForgotten(Cache):
    """After cropping to 16 tokens, all but the last input of the phasic filter are gone."""

    def last(self, name: str, count: int) -> Tensor | None:
        return super().last(name, 1 if name.startswith("tap") and self.length == 16 else count)


class BiasesWiped(ModulatedTransformer):
    """Another initialisation after the controller's, as the published code has it."""

    def __init__(self, config: NCNConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)


class ResetForgetsTheController(ModulatedTransformer):
    def reset_parameters(self) -> None:
        controller, self.controller = self.controller, None
        super().reset_parameters()
        self.controller = controller


class ControllerDrawsFirst(ModulatedTransformer):
    def reset_parameters(self) -> None:
        if self.config.controller is not None:
            torch.rand(1)
        super().reset_parameters()


BORDERS = (15, 16, 17)


ALL_SIGNALS = config({"signals": [*SIGNALS]})


def later_tokens() -> None:
    model = awake(ALL_SIGNALS)
    with torch.no_grad():
        properties.later_tokens_change_nothing(lambda ids: model(ids).logits, text(40), BORDERS)


def later_embeddings() -> None:
    model, input_ids = awake(ALL_SIGNALS), text(40)
    properties.later_embeddings_have_no_gradient(
        lambda embeddings: model.hidden_states(embeddings, input_ids)[0], model.embedding(input_ids), BORDERS
    )


@pytest.mark.parametrize("contract", [later_tokens, later_embeddings])
@pytest.mark.parametrize(
    "mutant",
    [leaky_pool, pool_one_token_ahead, phasic_one_token_ahead, attention_without_a_mask, mix_one_token_ahead],
)
def test_causality_fails(mutant: Mutant, contract: Callable[[], None], monkeypatch: Patch) -> None:
    contract()
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"later embeddings|what came before"):
        contract()


def pieces() -> None:
    properties.pieces_equal_the_whole(awake(config(positions="learned")), text(40), (17, 18, 19))


def padding() -> None:
    properties.padding_on_the_left_changes_nothing(awake(config(positions="learned")), text(36), (0, 11), (18, 19))


def padding_among_documents() -> None:
    model = awake(config(cross_documents=False, positions="learned"))
    properties.padding_on_the_left_changes_nothing(model, text(36), (0, 11), (18, 19))


@pytest.mark.parametrize(
    ("mutant", "contract"),
    [
        (leaky_pool, pieces),
        (salience_without_past, pieces),
        (phasic_without_past, pieces),
        (continued_positions_from_zero, pieces),
        (positions_that_count_padding, padding),
        (segments_ignored, padding),
        (segments_ignored_by_the_pool, padding),
        (segments_ignored_by_the_phasic_filter, padding),
        (segments_ignored, padding_among_documents),
        (salience_without_past, padding_among_documents),
    ],
)
def test_one_function_fails(mutant: Mutant, contract: Callable[[], None], monkeypatch: Patch) -> None:
    contract()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        contract()


def test_one_function_fails_on_a_forgetful_cache() -> None:
    model, input_ids = awake(config()), text(36)
    with pytest.raises(AssertionError):
        properties.beams_keep_their_pasts(model, input_ids, 17, SalienceStaysInPlace)
    for cache in (SalienceIsNotCropped, PhasicIsForgotten):
        with pytest.raises(AssertionError):
            properties.a_cropped_cache_forgets(model, input_ids, (16,), cache)


@pytest.mark.parametrize("build", [BiasesWiped, ResetForgetsTheController, ControllerDrawsFirst])
def test_neutral_start_fails(build: type[ModulatedTransformer]) -> None:
    with pytest.raises(AssertionError):
        properties.starts_neutral(config(), text(20), build)


@pytest.mark.parametrize(
    "mutant",
    [
        precision_skipped,
        head_gate_skipped,
        one_head_skipped,
        gain_skipped,
        gate_skipped,
        film_skipped,
        mix_skipped,
        last_layer_forgets_its_signals,
    ],
)
def test_effect_fails(mutant: Mutant, monkeypatch: Patch) -> None:
    model, input_ids = awake(ALL_SIGNALS), text(20)
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="has no effect"):
        properties.every_signal_acts(model, input_ids)
    with pytest.raises(AssertionError, match="outputs without a gradient"):
        properties.every_signal_learns(model, input_ids)


def test_learning_fails_where_signals_are_detached(monkeypatch: Patch) -> None:
    signals_detached(monkeypatch)
    with pytest.raises(AssertionError, match="outputs without a gradient"):
        properties.every_signal_learns(awake(config()), text(20))


@pytest.mark.parametrize("mutant", [precision_on_queries_and_keys, precision_upside_down, precision_skipped])
def test_temperature_fails(mutant: Mutant, monkeypatch: Patch) -> None:
    model, input_ids = awake(config()), torch.randint(1, VOCABULARY, (2, 12))
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        properties.precision_is_inverse_temperature(model, input_ids, monkeypatch)


@pytest.mark.parametrize(
    "mutant",
    [
        leaky_pool,
        slower_decay,
        decay_without_gradient,
        rotated_by_neighbours,
        precision_upside_down,
        signals_detached,
        mix_of_larger_embeddings,
        mix_without_gradient,
    ],
)
def test_truth_fails(mutant: Mutant, monkeypatch: Patch) -> None:
    model = awake(ALL_SIGNALS)
    properties.equals_the_equations(model, text(12, rows=1))
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        properties.equals_the_equations(model, text(12, rows=1))


@pytest.mark.parametrize(
    "mutant",
    [
        segments_ignored,
        segments_ignored_by_the_pool,
        segments_ignored_by_the_phasic_filter,
        positions_that_count_padding,
    ],
)
def test_documents_fail(mutant: Mutant, monkeypatch: Patch) -> None:
    model = awake(config(cross_documents=False, positions="learned"))
    first, second = text(17), torch.randint(1, VOCABULARY, (2, 12))
    second[:, 0] = SEPARATOR
    properties.documents_are_apart(model, first, second)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        properties.documents_are_apart(model, first, second)


def test_a_model_that_keeps_documents_apart_does_not_see_them() -> None:
    second = torch.full((2, 3), SEPARATOR)
    with pytest.raises(AssertionError):
        properties.documents_see_each_other(awake(variants["documents"]), text(8), second)
