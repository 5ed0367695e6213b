"""The signal table: ranges, exact inverses, layouts, homeostasis, and statistics that tell trouble from health."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ncn.config.model import ControllerConfig, NCNConfig, SignalName
from ncn.config.signals import SIGNALS, SITES, Range
from ncn.core.signals.modulation import Factors
from ncn.core.signals.statistics import controller_problem, signal_statistics
from ncn.core.signals.table import RangeMap, SignalLayout, homeostatic_loss, range_map, signal_shape

MAPS = {f"{name} {maps}": range_map(name, maps) for name in SIGNALS for maps in ("smooth", "published")}


def config(**controller: Any) -> NCNConfig:
    return NCNConfig(
        vocab_size=8, d_model=12, num_layers=2, num_heads=3, context_length=8, controller=ControllerConfig(**controller)
    )


def test_the_rows_of_the_table_fit_together() -> None:
    assert sorted(Factors._fields) == sorted(SITES)
    assert get_args(SignalName) == tuple(SIGNALS)
    page = Path("docs/equations.md").read_text("utf-8")
    for name, row in SIGNALS.items():
        assert row.name == name
        assert row.per == "layer" or len({SITES[site].parts for site in row.sites}) == 1
        assert {SITES[site].adds for site in row.sites} == {row.neutral == 0}
        assert re.search(rf"^\| {name} {row.symbol} .*\| {re.escape(row.smooth.map)} \|", page, re.MULTILINE), name


@pytest.mark.parametrize("name", SIGNALS)
def test_smooth_maps_are_exactly_neutral_at_zero(name: str) -> None:
    mapping = range_map(name, "smooth")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert mapping.forward(torch.zeros(3, dtype=dtype)).tolist() == [SIGNALS[name].neutral] * 3
    assert mapping.inverse(mapping.start) == 0
    assert mapping.start == SIGNALS[name].neutral


@pytest.mark.parametrize("mapping", MAPS.values(), ids=MAPS)
@given(share=st.floats(0.001, 0.999))
def test_inverses(mapping: RangeMap, share: float) -> None:
    value = mapping.low + share * (mapping.high - mapping.low)
    raw = torch.tensor(mapping.inverse(value), dtype=torch.float64)
    assert mapping.forward(raw).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("mapping", MAPS.values(), ids=MAPS)
def test_ranges_and_slopes(mapping: RangeMap) -> None:
    raw = torch.linspace(-200, 200, 4001, dtype=torch.float64, requires_grad=True)
    values = mapping.forward(raw)
    assert values.min() >= mapping.low
    assert values.max() <= mapping.high
    assert values.detach()[0].item() == pytest.approx(mapping.low, abs=1e-6)
    assert values.detach()[-1].item() == pytest.approx(mapping.high, abs=1e-6)
    assert (values.diff() >= 0).all()
    (slopes,) = torch.autograd.grad(values.sum(), raw)
    assert slopes.isfinite().all()
    assert slopes[raw.abs() < 1].min() > 0.01
    assert mapping.forward(raw.detach().float()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("gain", lambda z: 2 / (1 + math.exp(-z)), 1.0),
        ("precision", lambda z: math.log1p(math.exp(z)) + 0.01, 1.0),
        ("ffn_gate", lambda z: 1 / (1 + math.exp(-z)), 0.9525741268224334),
    ],
)
def test_published_maps(name: str, published: Any, expected: float) -> None:
    mapping = range_map(name, "published")
    for z in (-2.0, 0.0, 1.5):
        assert mapping.forward(torch.tensor(z, dtype=torch.float64)).item() == pytest.approx(published(z), rel=1e-14)
    assert mapping.start == pytest.approx(expected)


def test_published_precision_is_clamped() -> None:
    assert range_map("precision", "published").forward(torch.tensor(9.0)) == 4


def test_a_signal_that_was_never_published_keeps_its_smooth_map() -> None:
    assert range_map("head_gate", "published") == range_map("head_gate", "smooth")


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("gain", {}, ()),
        ("gain", {"gain_per": "sublayer"}, (2,)),
        ("precision", {}, (3,)),
        ("precision", {"precision_per": "layer"}, ()),
        ("ffn_gate", {}, ()),
        ("head_gate", {"precision_per": "layer"}, (3,)),
        ("norm_film", {"film_groups": 2}, (4,)),
        ("residual_mix", {"gain_per": "sublayer"}, ()),
    ],
)
def test_shapes(name: str, settings: dict[str, str], shape: tuple[int, ...]) -> None:
    assert signal_shape(name, config(**settings)) == shape


def test_a_layout_cuts_in_the_configured_order() -> None:
    layout = SignalLayout.of(config(signals=("head_gate", "gain", "precision")))
    assert layout.sizes == [3, 1, 3]
    raw = torch.randn(2, 5, 2, 7, dtype=torch.float64)
    signals = layout.split(raw)
    assert list(signals) == ["head_gate", "gain", "precision"]
    assert torch.equal(signals["head_gate"], 2 * raw[..., :3].sigmoid())
    assert torch.equal(signals["gain"], 2 * raw[..., 3].sigmoid())
    torch.testing.assert_close(signals["precision"], 4 ** raw[..., 4:].tanh(), rtol=1e-14, atol=0)


def test_signals_are_never_bfloat16() -> None:
    raw = torch.full((1, 1, 2, 8), 2**-9, dtype=torch.bfloat16)
    assert all((signal != 1).all() for signal in SignalLayout.of(config()).split(raw).values())


@pytest.mark.parametrize("maps", ["smooth", "published"])
def test_the_initial_bias_gives_the_starting_values(maps: str) -> None:
    layout = SignalLayout.of(config(maps=maps))
    signals = layout.split(layout.initial_bias().double().expand(1, 1, 2, -1))
    for (name, signal), mapping in zip(signals.items(), layout.maps, strict=True):
        torch.testing.assert_close(signal, torch.full_like(signal, mapping.start), rtol=1e-6, atol=0, msg=name)


def test_homeostatic_loss_by_hand() -> None:
    gain = torch.tensor([[[1.5, 0.5], [1.0, 1.0]]])
    precision = torch.tensor([[[[3.0], [1.0]], [[1.0], [1.0]]]])
    expected = (0.25 + 0.25) / 4 + 4 / 4
    assert homeostatic_loss({"gain": gain, "precision": precision}).item() == expected
    assert homeostatic_loss({"gain": torch.ones(2, 3, 4)}).item() == 0
    assert homeostatic_loss({"residual_mix": torch.tensor([[[0.5, 0.0]]])}).item() == 0.125


def test_homeostatic_loss_keeps_float64() -> None:
    gain = torch.full((1, 1, 1), 1 + 1e-12, dtype=torch.float64)
    assert homeostatic_loss({"gain": gain}).item() > 0


def healthy() -> dict[str, Tensor]:
    varied = torch.linspace(-0.5, 0.5, 60).view(3, 10, 2)
    return {
        "gain": 1 + varied,
        "precision": torch.exp(varied)[..., None],
        "ffn_gate": 1 - varied.abs(),
        "residual_mix": varied,
    }


def problem(signals: dict[str, Tensor], **controller: Any) -> str | None:
    settings = ControllerConfig(**controller)
    return controller_problem(settings, signal_statistics(signals, settings.maps))


def test_statistics_by_hand() -> None:
    gain = torch.tensor([[[0.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    values = signal_statistics({"gain": gain}, "smooth")["gain"]
    assert values["mean"] == 1
    assert values["saturation"] == 0.5  # two of four values of the first layer, none of the second
    assert values["spread"] == pytest.approx((2 / 3) ** 0.5 / 2)


def test_one_saturated_layer_of_many_is_a_problem() -> None:
    signals = healthy() | {"gain": torch.cat([torch.zeros(3, 10, 1), torch.rand(3, 10, 5) + 0.5], 2)}
    assert "gain" in (problem(signals) or "")


def test_statistics_of_a_single_token() -> None:
    values = signal_statistics({"gain": torch.ones(1, 1, 3)}, "smooth")["gain"]
    assert values["spread"] == values["effective_rank"] == 0


def rank_of(signal: Tensor) -> float:
    return signal_statistics({"gain": signal}, "smooth")["gain"]["effective_rank"]


def test_the_effective_rank_counts_independent_ways_of_moving() -> None:
    generator = torch.Generator().manual_seed(0)
    free = 1 + 0.1 * torch.randn(4, 2500, 3, 2, generator=generator)
    knob = torch.randn(4, 2500, 1, 1, generator=generator)
    collapsed = 1 + 0.1 * knob * torch.tensor([[1.0, -2.0], [3.0, 0.5], [1.0, 0.0]])
    assert rank_of(free) == pytest.approx(6, abs=0.01)
    assert rank_of(free[..., 0]) == pytest.approx(3, abs=0.01)
    assert rank_of(collapsed) == pytest.approx(1, abs=1e-4)
    assert rank_of(collapsed + 5 * torch.rand(3, 2, generator=generator)) == pytest.approx(1, abs=1e-4)
    assert rank_of(torch.full((4, 2500, 3, 2), 1.1)) == 0
    # two columns that move twice as far as the others: shares of 4/12, 4/12 and four of 1/12
    uneven = torch.kron(torch.eye(6), torch.tensor([[1.0], [-1.0]])) * torch.tensor([2.0, 2, 1, 1, 1, 1])
    entropy = 2 / 3 * math.log(3) + 1 / 3 * math.log(12)
    assert rank_of(uneven[None]) == pytest.approx(math.exp(entropy))
    assert rank_of(torch.randn(1, 50_000, 100, 2, generator=generator)) == pytest.approx(64, abs=0.1)


@pytest.mark.parametrize("kind", ["ncn", "local", "static"])
def test_healthy_signals_are_no_problem(kind: str) -> None:
    assert problem(healthy(), kind=kind) is None


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("gain", 0.001),
        ("gain", 1.999),
        ("precision", 0.26),
        ("precision", 3.99),
        ("ffn_gate", 0.001),
        ("residual_mix", -0.99),
        ("residual_mix", 0.99),
    ],
)
def test_a_saturated_signal_is_named(name: str, bound: float) -> None:
    signals = healthy()
    signals[name] = torch.full((3, 10, 2), bound)
    text = problem(signals)
    assert text is not None
    assert name in text
    assert "100%" in text


@pytest.mark.parametrize("maps", ["smooth", "published"])
def test_an_open_gate_is_not_saturated(maps: str) -> None:
    signals = healthy()
    signals["ffn_gate"] = torch.full_like(signals["ffn_gate"], range_map("ffn_gate", maps).high - 1e-4)
    assert problem(signals, maps=maps) is None


def test_what_adds_nothing_at_its_lower_bound_is_not_saturated_there(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Range("σ(z)", 0.0, 1.0, start=0.0)
    monkeypatch.setitem(SIGNALS, "share", replace(SIGNALS["residual_mix"], name="share", smooth=share))
    signal = torch.cat([torch.zeros(1, 4, 1), torch.tensor([[[1.0], [0.0], [0.0], [0.5]]])], 2)
    assert signal_statistics({"share": signal}, "smooth")["share"]["saturation"] == 0.25


def test_signals_that_start_neutral_and_stay_are_stuck() -> None:
    stuck = {name: torch.full_like(signal, SIGNALS[name].neutral + 0.02) for name, signal in healthy().items()}
    assert "stuck" in (problem(stuck) or "")
    assert "stuck" in (problem(stuck, kind="local") or "")
    assert problem(stuck, kind="static") is None  # a constant is all that static gates can send
    assert problem(stuck | {"gain": healthy()["gain"]}) is None
