"""A scan keeps exactly what it was given, refuses what does not belong together, and saves by suffix."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncn.errors import UserError
from ncn.pages.characters import label
from ncn.scans.colours import ColourScale
from ncn.scans.scan import Scan
from scans import make_scan


def test_json_gives_back_exactly_the_same_scan(tmp_path: Path) -> None:
    scan = make_scan(["He", " said", "\n", "\udc80", "日", "</script>", "a\\b"], layers=3, heads=2)
    scan.surprisal[0] = None
    back = Scan.from_json(scan.save(tmp_path / "scan.json").read_text(encoding="utf-8"))
    for name in ("tokens", "surprisal", "neutral", "bounds", "text", "model"):
        assert getattr(back, name) == getattr(scan, name)
    assert list(back.signals) == list(scan.signals)
    for name, values in scan.signals.items():
        np.testing.assert_array_equal(back.signals[name], values, strict=True)


@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=8))
def test_float32_signals_survive_bit_for_bit(values: list[float]) -> None:
    single = np.array(values, dtype=np.float32)[:, None]
    scan = Scan(
        ["x"] * len(values),
        [1.0] * len(values),
        {"gain": single.astype(np.float64)},
        {"gain": 1.0},
        {"gain": (0.0, 2.0)},
        "",
        "",
    )
    assert Scan.from_json(scan.to_json()).signals["gain"].astype(np.float32).tobytes() == single.tobytes()


@pytest.mark.parametrize("name", ["scan.pdf", "scan", "scan.pkl"])
def test_an_unknown_suffix_is_refused_in_one_line_that_names_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^cannot save a scan as .*\.png, \.html or \.json file$") as caught:
        make_scan(["a"]).save(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scan.png", "scan.html", "SCAN.JSON"])
def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    assert make_scan(["a", " b"]).save(str(tmp_path / name)) == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 300


def test_a_folder_that_does_not_exist_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*nowhere.*: No such file or directory"):
        make_scan(["a"]).save(tmp_path / "nowhere" / "scan.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", '"format": "ncn-scan-1"'),
        ('{"format": "ncn-scan-1", "tokens": []}', "damaged"),
        ('{"format": "ncn-scan-1", "tokens": "ab", "text": "ab", "model": "m"}', "must be strings"),
        (make_scan(["a"]).to_json().replace('"model"', '"code"'), "damaged: it has no 'model'"),
        (make_scan(["a"]).to_json()[:-1] + ', "code": "x"}', "damaged"),
    ],
)
def test_foreign_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scan.from_json(text)


def test_a_saved_scan_with_a_signal_cut_short_is_refused() -> None:
    fields = json.loads(make_scan(["a", "b", "c"]).to_json())
    fields["signals"]["gain"].pop()
    with pytest.raises(UserError, match=r"damaged: signal 'gain' has shape \(2, 2\); expected \(3, layers\)"):
        Scan.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [], "surprisal": []}, "at least one token"),
        ({"surprisal": [1.0]}, "2 tokens but 1 surprisals"),
        ({"surprisal": [1.0, math.inf]}, "infinite or not a number"),
        ({"signals": {"gain": np.ones((3, 2))}}, r"shape \(3, 2\); expected \(2, layers\)"),
        ({"signals": {"gain": np.ones(2)}}, r"shape \(2,\)"),
        ({"signals": {"gain": np.full((2, 2), np.nan)}}, "infinite or not a number"),
        ({"neutral": {}}, "same names"),
        ({"bounds": {"gain": (1.5, 2.0)}}, "neutral value 1.0 must lie in"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {
        "tokens": ["a", "b"],
        "surprisal": [1.0, None],
        "signals": {"gain": np.ones((2, 2))},
        "neutral": {"gain": 1.0},
        "bounds": {"gain": (0.0, 2.0)},
        "text": "ab",
        "model": "m",
    }
    Scan(**parts)
    with pytest.raises(ValueError, match=message):
        Scan(**parts | change)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" wanted", "·wanted"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("\r", "\\r"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("日", "日"),
        ("", "∅"),
    ],
)
def test_labels_show_what_cannot_be_seen(token: str, shown: str) -> None:
    assert label(token) == shown


@pytest.mark.parametrize(
    ("bounds", "low", "high"),
    [
        ((0.0, 2.0), 0.0, 2.0),
        ((0.0, 1.05), 0.0, 2.0),  # a gate shares the colours of a gain
        ((0.0, 1.0), 0.0, 2.0),
        ((0.25, 4.0), 0.25, 4.0),
        ((0.01, 4.0), 0.25, 4.0),  # the published precision shares the colours of ours
    ],
)
def test_the_fixed_scale_is_centred_at_neutral(bounds: tuple[float, float], low: float, high: float) -> None:
    scale = ColourScale.fixed(1.0, bounds)
    assert (scale.value(-1.0), scale.value(0.0), scale.value(1.0)) == pytest.approx((low, 1.0, high))
    np.testing.assert_allclose(scale.position(np.array([low, 1.0, high])), [-1, 0, 1], atol=1e-12)


def test_what_changes_nothing_at_zero_has_a_linear_scale_around_it() -> None:
    scale = ColourScale.fixed(0.0, (-1.0, 1.0))
    np.testing.assert_allclose(scale.position(np.array([-1.0, -0.5, 0.0, 1.0])), [-1, -0.5, 0, 1])
    assert [label for _, label in scale.ticks()] == ["-1", "-0.5", "0", "0.5", "1"]
    assert scale.fitted(np.array([-0.2, 0.1])).value(-1.0) == pytest.approx(-0.2)


def test_a_factor_and_its_inverse_lie_equally_far_from_neutral() -> None:
    positions = ColourScale.fixed(1.0, (0.25, 4.0)).position(np.array([0.5, 2.0]))
    np.testing.assert_allclose(positions, [-0.5, 0.5])


@given(st.lists(st.floats(0.26, 3.9), min_size=1), st.sampled_from([(0.0, 2.0), (0.25, 4.0)]))
def test_a_fitted_scale_stays_centred_and_just_holds_every_value(
    values: list[float], bounds: tuple[float, float]
) -> None:
    fixed = ColourScale.fixed(1.0, bounds)
    fitted = fixed.fitted(np.array(values))
    positions = np.abs(fitted.position(np.array(values)))
    assert fitted.value(0.0) == 1.0
    assert positions.max() <= 1 + 1e-9
    assert positions.max() == pytest.approx(1) or fitted.reach == pytest.approx(1e-3 * fixed.reach)
