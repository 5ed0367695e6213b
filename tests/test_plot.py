"""What the pictures show: colours centred at neutral, alike in every scan, labels that fit, curves by tokens."""

import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from ncn import plot
from ncn.brain_scan import Scan
from ncn.errors import UserError
from ncn.plot import style
from scans import make_scan

BLUE, ORANGE = (0x00, 0x39, 0x69), (0x5B, 0x25, 0x12)
NEUTRAL = (0xF5, 0xF5, 0xF5)


def panels(figure: Figure, name: str) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() == name]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    image = imread(io.BytesIO(plot.png(figure)))
    return np.round(255 * image[..., :3]).astype(np.uint8)


def colour_at(figure: Figure, axes: Axes, column: int, row: int) -> tuple[int, ...]:
    image = pixels(figure)
    x, y = axes.transData.transform((column, row + 0.2))
    return tuple(int(part) for part in image[image.shape[0] - 1 - round(y), round(x)])


def one_signal(values: list[list[float]], bounds: tuple[float, float] = (0.0, 2.0)) -> Scan:
    count = len(values)
    return Scan(["x"] * count, [1.0] * count, {"s": np.array(values)}, {"s": 1.0}, {"s": bounds}, "x" * count, "m")


@pytest.mark.parametrize(
    ("bounds", "low", "high"), [((0.0, 2.0), 0.0, 2.0), ((0.0, 1.05), 0.0, 2.0), ((0.25, 4.0), 0.25, 4.0)]
)
def test_neutral_is_the_middle_colour_and_the_ends_of_the_scale_the_last(
    bounds: tuple[float, float], low: float, high: float
) -> None:
    figure = plot.brain_scan(one_signal([[low], [1.0], [high]], bounds))
    (axes,) = panels(figure, "s")
    seen = [colour_at(figure, axes, column, 0) for column in range(3)]
    np.testing.assert_allclose(seen, [BLUE, NEUTRAL, ORANGE], atol=3)


def test_a_value_has_the_same_colour_in_two_scans_that_move_differently() -> None:
    quiet = plot.brain_scan(one_signal([[1.3], [1.0], [1.1]]))
    loud = plot.brain_scan(one_signal([[1.3], [0.02], [1.98]]))
    assert colour_at(quiet, panels(quiet, "s")[0], 0, 0) == colour_at(loud, panels(loud, "s")[0], 0, 0)
    limits = {panels(figure, "s")[0].images[0].get_clim() for figure in (quiet, loud)}
    assert limits == {(-1.0, 1.0)}


def test_contrast_from_the_data_stretches_a_quiet_scan_and_says_so() -> None:
    scan = one_signal([[1.02], [1.0], [0.99]])
    figure = plot.brain_scan(scan, contrast="data")
    (axes,) = panels(figure, "s")
    np.testing.assert_allclose(colour_at(figure, axes, 0, 0), ORANGE, atol=3)
    np.testing.assert_allclose(colour_at(figure, axes, 1, 0), NEUTRAL, atol=3)
    assert "fitted to this text" in figure.texts[0].get_text()
    assert "fitted to this text" not in plot.brain_scan(scan).texts[0].get_text()


def test_each_panel_holds_layers_by_tokens_and_heads_within_layers() -> None:
    scan = make_scan(["a", "b", "c", "d", "e"], layers=3, heads=4)
    figure = plot.brain_scan(scan)
    for name, values in scan.signals.items():
        (axes,) = panels(figure, name)
        shown = axes.images[0].get_array()
        assert shown is not None
        for token, layer in np.ndindex(values.shape[:2]):
            for head in range(values[token, layer].size):
                value = values[token, layer, head] if values.ndim == 3 else values[token, layer]
                row = layer * values[token, layer].size + head
                assert shown[row, token] == pytest.approx(scan.scale(name).position(np.array([value]))[0])
    names = [label.get_text() for label in panels(figure, "gain")[0].get_yticklabels()]
    assert names == ["layer 0", "layer 1", "layer 2"]
    ticks = panels(figure, "precision")[0].get_yticklabels()
    by_row = {round(tick.get_position()[1]): tick.get_text() for tick in ticks}
    assert by_row == {
        0: "layer 0, head 0",
        3: "head 3",
        4: "layer 1, head 0",
        7: "head 3",
        8: "layer 2, head 0",
        11: "head 3",
    }


def test_the_map_of_many_layers_and_heads_has_thinner_rows_and_labels_that_can_be_read() -> None:
    for layers, labelled in (30, range(30)), (80, range(0, 80, 2)):
        figure = plot.brain_scan(make_scan(["a", "b"], layers=layers, heads=9))
        assert figure.get_size_inches()[1] < 30
        (axes,) = panels(figure, "precision")
        labels = axes.get_yticklabels()
        assert [label.get_text() for label in labels] == [f"layer {layer}" for layer in labelled]
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_each_panel_tells_its_smallest_mean_and_largest_value() -> None:
    (axes,) = panels(plot.brain_scan(one_signal([[0.5], [1.0], [1.8]])), "s")
    assert "min 0.50   mean 1.10   max 1.80" in [text.get_text() for text in axes.texts]


def test_the_colour_bar_names_both_ends_and_neutral() -> None:
    figure = plot.brain_scan(one_signal([[1.0]], (0.25, 4.0)))
    bar = figure.axes[figure.axes.index(panels(figure, "s")[0]) + 1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["¼", "½", "1 neutral", "2", "4"]
    assert bar.get_ylim() == (-1, 1)


def test_surprisal_stands_below_its_column_in_bits() -> None:
    scan = make_scan(["a", "b", "c", "d"])
    scan.surprisal[2] = None
    figure = plot.brain_scan(scan)
    (bars,) = panels(figure, "surprisal")
    assert [bar.get_height() for bar in bars.patches] == [bits or 0.0 for bits in scan.surprisal]
    (gain,) = panels(figure, "gain")
    assert bars.get_xlim() == gain.get_xlim()
    assert bars.get_position().x0 == gain.get_position().x0
    assert bars.get_position().width == gain.get_position().width
    assert bars.get_position().y1 < min(axes.get_position().y0 for axes in figure.axes if axes.images)


@pytest.mark.parametrize("count", [1, 17, 60, 150])
def test_every_token_has_its_label_and_no_two_labels_touch(count: int) -> None:
    words = ["Tim", "my", " wanted", " strawberries", ".", " an extraordinarily long one"]
    scan = make_scan([words[i % len(words)] for i in range(count)])
    figure = plot.brain_scan(scan)
    figure.draw_without_rendering()
    bands = panels(figure, "surprisal")
    assert len(bands) == len(panels(figure, "gain")) == math.ceil(count / 64)
    texts = [tick.get_text() for axes in bands for tick in axes.get_xticklabels()]
    assert len(texts) == count
    assert texts[:5] == ["Tim", "my", "·wanted", "·strawberries", "."][:count]
    frame = figure.bbox
    for axes in bands:
        boxes = [tick.get_window_extent() for tick in axes.get_xticklabels()]
        assert all(before.x1 <= after.x0 for before, after in pairwise(boxes))
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_bands_show_all_tokens_once_in_order() -> None:
    scan = make_scan([f"t{i}" for i in range(130)])
    figure = plot.brain_scan(scan)
    shown = np.concatenate([axes.images[0].get_array() for axes in panels(figure, "gain")], axis=1)
    np.testing.assert_allclose(shown, scan.scale("gain").position(scan.signals["gain"]).T)


def test_any_unicode_is_drawn_without_a_warning_or_an_empty_box() -> None:
    tokens = ["$x$", "$", "日本", "\udc80", "\x00", "e\u0301", "\u202e", "\\alpha", "😀", "%_^{"]
    figure = plot.brain_scan(make_scan(tokens))
    plot.png(figure)
    (axes,) = panels(figure, "surprisal")
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels[:5] == ["$x$", "$", "\\u65e5\\u672c", "\\udc80", "\\x00"]


def test_a_text_too_long_for_a_picture_is_sent_to_the_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 512 tokens and this scan has 513; save it as \.html"):
        make_scan(["a"] * 513).save(tmp_path / "scan.png")
    assert not list(tmp_path.iterdir())


def test_the_published_curve_is_the_published_log() -> None:
    curve = plot.published_curve()
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
    plot.loss_curve(records, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    assert curve(axes, "this run, training") == [(record["tokens"], record["loss"]) for record in records]
    assert curve(axes, "this run, validation (last 3.500)") == [(10000, 3.5)]
    assert axes.get_ylabel() == "loss (nats per token)"
    assert axes.get_xlabel() == "tokens seen"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert imread(tmp_path / "loss.png").std() > 0.01


def test_many_noisy_losses_are_smoothed_without_lag(tmp_path: Path, drawn: list[Figure]) -> None:
    plot.loss_curve(metrics(2000, noise=0.3), tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    smooth = np.array(curve(axes, "this run, training"))
    truth = 3 + 4 / (smooth[:, 0] / 1000)
    assert np.abs(smooth[200:, 1] - truth[200:])[:-50].max() < 0.25
    assert len(axes.lines) == 2  # the raw losses stay in sight


def test_the_published_run_is_shown_with_its_caveat_on_a_logarithmic_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    plot.loss_curve(metrics(20), tmp_path / "loss.png", published=plot.published_curve())
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[1] > 519700480
    legend = axes.get_legend()
    assert legend is not None
    assert any("not causal" in text.get_text() for text in legend.get_texts())
    assert "published NCN" in axes.get_title(loc="left")
    plot.loss_curve(metrics(20), tmp_path / "loss.png", published=[(5000, 3.0)])
    assert drawn[1].axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("records", [[], [{"tokens": 1.0, "loss": math.nan}], [{"tokens": 1.0}]])
def test_a_run_without_losses_is_the_users_mistake(tmp_path: Path, records: list[dict[str, float]]) -> None:
    with pytest.raises(UserError, match="no loss to draw"):
        plot.loss_curve(records, tmp_path / "loss.png")


def test_arms_are_compared_with_the_last_where_both_were_measured(tmp_path: Path, drawn: list[Figure]) -> None:
    arms = {"a $1$ {}": [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)], "twin": [(1.0, 5.0), (3.0, 3.5), (4.0, 3.0)]}
    plot.compare_curves(arms, tmp_path / "arms.png")
    top, bottom = drawn[0].axes
    assert curve(top, "a $1$ {} (last 3.000)") == arms["a $1$ {}"]
    assert curve(top, "twin (last 3.000)") == arms["twin"]
    np.testing.assert_allclose(np.asarray(bottom.lines[0].get_xydata()), [[1, 0], [3, -0.5]])
    assert "twin" in bottom.get_title(loc="left")
    assert top.lines[0].get_color() == bottom.lines[0].get_color() != top.lines[1].get_color()


def test_one_arm_needs_no_difference(tmp_path: Path, drawn: list[Figure]) -> None:
    plot.compare_curves({"only": [(1.0, 2.0)]}, tmp_path / "arms.png")
    assert len(drawn[0].axes) == 1


@pytest.mark.parametrize(("arms", "message"), [({}, "no arms to compare"), ({"a": []}, "arm 'a' has no finite loss")])
def test_nothing_to_compare_is_the_users_mistake(
    tmp_path: Path, arms: dict[str, list[tuple[float, float]]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plot.compare_curves(arms, tmp_path / "arms.png")


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        plot.loss_curve(metrics(2), tmp_path / "nowhere" / "loss.png")
