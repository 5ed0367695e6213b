"""What the picture of a scan shows: colours centred at neutral, alike in every scan, and labels that fit."""

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

from ncn.errors import UserError
from ncn.pages.style import png
from ncn.scans.figures import brain_scan
from ncn.scans.scan import Scan
from scans import make_scan

BLUE, ORANGE = (0x00, 0x39, 0x69), (0x5B, 0x25, 0x12)
NEUTRAL = (0xF5, 0xF5, 0xF5)


def panels(figure: Figure, name: str) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() == name]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    image = imread(io.BytesIO(png(figure)))
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
    figure = brain_scan(one_signal([[low], [1.0], [high]], bounds))
    (axes,) = panels(figure, "s")
    seen = [colour_at(figure, axes, column, 0) for column in range(3)]
    np.testing.assert_allclose(seen, [BLUE, NEUTRAL, ORANGE], atol=3)


def test_a_value_has_the_same_colour_in_two_scans_that_move_differently() -> None:
    quiet = brain_scan(one_signal([[1.3], [1.0], [1.1]]))
    loud = brain_scan(one_signal([[1.3], [0.02], [1.98]]))
    assert colour_at(quiet, panels(quiet, "s")[0], 0, 0) == colour_at(loud, panels(loud, "s")[0], 0, 0)
    limits = {panels(figure, "s")[0].images[0].get_clim() for figure in (quiet, loud)}
    assert limits == {(-1.0, 1.0)}


def test_contrast_from_the_data_stretches_a_quiet_scan_and_says_so() -> None:
    scan = one_signal([[1.02], [1.0], [0.99]])
    figure = brain_scan(scan, contrast="data")
    (axes,) = panels(figure, "s")
    np.testing.assert_allclose(colour_at(figure, axes, 0, 0), ORANGE, atol=3)
    np.testing.assert_allclose(colour_at(figure, axes, 1, 0), NEUTRAL, atol=3)
    assert "fitted to this text" in figure.texts[0].get_text()
    assert "fitted to this text" not in brain_scan(scan).texts[0].get_text()


def test_each_panel_holds_layers_by_tokens_and_heads_within_layers() -> None:
    scan = make_scan(["a", "b", "c", "d", "e"], layers=3, heads=4)
    figure = brain_scan(scan)
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
        figure = brain_scan(make_scan(["a", "b"], layers=layers, heads=9))
        assert figure.get_size_inches()[1] < 30
        (axes,) = panels(figure, "precision")
        labels = axes.get_yticklabels()
        assert [label.get_text() for label in labels] == [f"layer {layer}" for layer in labelled]
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_each_panel_tells_its_smallest_mean_and_largest_value() -> None:
    (axes,) = panels(brain_scan(one_signal([[0.5], [1.0], [1.8]])), "s")
    assert "min 0.50   mean 1.10   max 1.80" in [text.get_text() for text in axes.texts]


def test_the_colour_bar_names_both_ends_and_neutral() -> None:
    figure = brain_scan(one_signal([[1.0]], (0.25, 4.0)))
    bar = figure.axes[figure.axes.index(panels(figure, "s")[0]) + 1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["¼", "½", "1 neutral", "2", "4"]
    assert bar.get_ylim() == (-1, 1)


def test_surprisal_stands_below_its_column_in_bits() -> None:
    scan = make_scan(["a", "b", "c", "d"])
    scan.surprisal[2] = None
    figure = brain_scan(scan)
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
    figure = brain_scan(scan)
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
    figure = brain_scan(scan)
    shown = np.concatenate([axes.images[0].get_array() for axes in panels(figure, "gain")], axis=1)
    np.testing.assert_allclose(shown, scan.scale("gain").position(scan.signals["gain"]).T)


def test_any_unicode_is_drawn_without_a_warning_or_an_empty_box() -> None:
    tokens = ["$x$", "$", "日本", "\udc80", "\x00", "e\u0301", "\u202e", "\\alpha", "😀", "%_^{"]
    figure = brain_scan(make_scan(tokens))
    png(figure)
    (axes,) = panels(figure, "surprisal")
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels[:5] == ["$x$", "$", "\\u65e5\\u672c", "\\udc80", "\\x00"]


def test_a_text_too_long_for_a_picture_is_sent_to_the_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 512 tokens and this scan has 513; save it as \.html"):
        make_scan(["a"] * 513).save(tmp_path / "scan.png")
    assert not list(tmp_path.iterdir())
