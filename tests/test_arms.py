"""Arms of a comparison have equal parameter counts, and equal shares of everything else."""

import pytest

from ncn.config import NCNConfig, presets
from ncn.experiments.arms import count_parameters, widened_baseline
from ncn.model import ModulatedTransformer
from tiny import MODEL


@pytest.mark.parametrize("name", presets())
def test_the_twin_of_a_preset_has_as_many_parameters(name: str) -> None:
    config = NCNConfig.preset(name)
    twin = widened_baseline(config)
    assert twin.controller is None
    assert abs(count_parameters(twin) / count_parameters(config) - 1) < 0.001
    assert twin.ffn_width > config.ffn_width
    assert twin.override(d_ff=config.d_ff, controller=config.controller) == config


def test_no_other_width_comes_closer() -> None:
    config = NCNConfig.parse(MODEL | {"activation": "swiglu"})
    target = count_parameters(config)
    twin = widened_baseline(config)
    gaps = {
        width: abs(count_parameters(twin.override(d_ff=width)) - target)
        for width in range(twin.ffn_width - 2, twin.ffn_width + 3)
    }
    assert min(gaps, key=gaps.__getitem__) == twin.ffn_width


def test_counting_without_storage_counts_what_is_stored() -> None:
    config = NCNConfig.parse(MODEL)
    stored = sum(parameter.numel() for parameter in ModulatedTransformer(config).parameters())
    assert count_parameters(config) == stored


def test_the_twin_of_a_baseline_is_itself() -> None:
    config = NCNConfig.parse(MODEL | {"controller": None, "d_ff": 40})
    assert widened_baseline(config) == config
