"""What loss curves show: training and validation by the tokens seen."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from ncn.errors import UserError
from ncn.pages import style
from ncn.pages.curves import compare_curves, loss_curve, published_curve


def test_the_published_curve_is_the_published_log() -> None:
    curve = published_curve()
    assert len(curve) == 793
    assert curve[0] == (655360, 9.9924)
    assert curve[-1] == (519700480, 1.6243)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written to files, for a look at their parts."""
    figures: list[Figure] = []
    real = style.png

    def png(figure: Figure) -> bytes:
        figures.append(figure)
        return real(figure)

    monkeypatch.setattr(style, "png", png)
    return figures


def metrics(count: int, noise: float = 0.0) -> list[dict[str, float]]:
    random = np.random.default_rng(0)
    return [
        {"step": i, "tokens": 1000 * i, "loss": 3 + 4 / i + noise * float(random.normal())} for i in range(1, count + 1)
    ]


def curve(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def test_the_loss_curve_shows_training_and_validation_by_tokens(tmp_path: Path, drawn: list[Figure]) -> None:
    records = metrics(20)
    records[9]["validation_loss"] = 3.5
    loss_curve(records, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    assert curve(axes, "this run, training") == [(record["tokens"], record["loss"]) for record in records]
    assert curve(axes, "this run, validation (last 3.500)") == [(10000, 3.5)]
    assert axes.get_ylabel() == "loss (nats per token)"
    assert axes.get_xlabel() == "tokens seen"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert imread(tmp_path / "loss.png").std() > 0.01


def test_many_noisy_losses_are_smoothed_without_lag(tmp_path: Path, drawn: list[Figure]) -> None:
    loss_curve(metrics(2000, noise=0.3), tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    smooth = np.array(curve(axes, "this run, training"))
    truth = 3 + 4 / (smooth[:, 0] / 1000)
    assert np.abs(smooth[200:, 1] - truth[200:])[:-50].max() < 0.25
    assert len(axes.lines) == 2  # the raw losses stay in sight


def test_the_published_run_is_shown_with_its_caveat_on_a_logarithmic_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    loss_curve(metrics(20), tmp_path / "loss.png", published=published_curve())
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[1] > 519700480
    legend = axes.get_legend()
    assert legend is not None
    assert any("not causal" in text.get_text() for text in legend.get_texts())
    assert "published NCN" in axes.get_title(loc="left")
    loss_curve(metrics(20), tmp_path / "loss.png", published=[(5000, 3.0)])
    assert drawn[1].axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("records", [[], [{"tokens": 1.0, "loss": math.nan}], [{"tokens": 1.0}]])
def test_a_run_without_losses_is_the_users_mistake(tmp_path: Path, records: list[dict[str, float]]) -> None:
    with pytest.raises(UserError, match="no loss to draw"):
        loss_curve(records, tmp_path / "loss.png")


def test_arms_are_compared_with_the_last_where_both_were_measured(tmp_path: Path, drawn: list[Figure]) -> None:
    arms = {"a $1$ {}": [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)], "twin": [(1.0, 5.0), (3.0, 3.5), (4.0, 3.0)]}
    compare_curves(arms, tmp_path / "arms.png")
    top, bottom = drawn[0].axes
    assert curve(top, "a $1$ {} (last 3.000)") == arms["a $1$ {}"]
    assert curve(top, "twin (last 3.000)") == arms["twin"]
    np.testing.assert_allclose(np.asarray(bottom.lines[0].get_xydata()), [[1, 0], [3, -0.5]])
    assert "twin" in bottom.get_title(loc="left")
    assert top.lines[0].get_color() == bottom.lines[0].get_color() != top.lines[1].get_color()


def test_one_arm_needs_no_difference(tmp_path: Path, drawn: list[Figure]) -> None:
    compare_curves({"only": [(1.0, 2.0)]}, tmp_path / "arms.png")
    assert len(drawn[0].axes) == 1


@pytest.mark.parametrize(("arms", "message"), [({}, "no arms to compare"), ({"a": []}, "arm 'a' has no finite loss")])
def test_nothing_to_compare_is_the_users_mistake(
    tmp_path: Path, arms: dict[str, list[tuple[float, float]]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare_curves(arms, tmp_path / "arms.png")


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        loss_curve(metrics(2), tmp_path / "nowhere" / "loss.png")
