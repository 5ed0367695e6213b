"""The page of a scan: whole in one file, safe whatever the tokens hold, and true to the scan's numbers."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from ncn.scans.colours import PALETTE
from ncn.scans.page import page
from ncn.scans.scan import Scan
from scans import make_scan

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "-->",
    "]]>",
    "&amp;&lt;",
    '"><img src=x onerror=alert(1)>',
    "{{scan}}",
    "{{title}}",
    "\\u003c",
    "\u2028",
    "\udc80",
    "\x00",
    "日本😀",
]


class Elements(HTMLParser):
    """Every element of a page with its attributes and the text that follows its start, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def data(self) -> dict[str, object]:
        index = next(i for i, (tag, attrs) in enumerate(self.elements) if tag == "script" and attrs.get("id") == "scan")
        content = json.loads(self.texts[index])
        assert isinstance(content, dict)
        return content


def test_the_page_holds_the_numbers_of_the_scan() -> None:
    scan = make_scan(["He", " ran", "\n"], layers=3, heads=4)
    scan.surprisal[0] = None
    content = Elements(page(scan)).data()
    assert content["tokens"] == scan.tokens
    assert content["labels"] == ["He", "·ran", "⏎"]
    assert content["surprisal"] == [None, *(pytest.approx(bits, rel=1e-4) for bits in scan.surprisal[1:])]
    assert content["palette"] == list(PALETTE)
    signals = {signal["name"]: signal for signal in content["signals"]}
    assert list(signals) == list(scan.signals)
    for name, values in scan.signals.items():
        rows = np.array(signals[name]["values"])
        heads = signals[name]["heads"]
        assert heads == (values.shape[2] if values.ndim == 3 else 0)
        # The page's row is layer × heads + head, as its script reads it.
        np.testing.assert_allclose(rows.T.reshape(values.shape), values, rtol=1e-4)
        scale = scan.scale(name)
        assert [signals[name][field] for field in ("neutral", "reach", "multiplicative")] == [
            scale.neutral,
            scale.reach,
            scale.multiplicative,
        ]


def test_no_token_and_no_name_can_add_an_element_or_change_the_data(tmp_path: Path) -> None:
    harmless = Elements(page(make_scan(["a"] * len(HOSTILE))))
    plain = make_scan(HOSTILE)
    hostile = Scan(**{**vars(plain), "model": "".join(HOSTILE)})
    written = hostile.save(tmp_path / "scan.html").read_text(encoding="utf-8")
    found = Elements(written)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert found.data()["tokens"] == HOSTILE
    block = re.search(r'id="scan">(.*?)</script>', written, re.DOTALL)
    assert block is not None
    assert not set("<>&") & set(block[1])
    assert block[1].isascii()


def test_the_page_asks_for_nothing_from_outside() -> None:
    text = page(make_scan(["a", "b"]))
    found = Elements(text)
    for tag, attrs in found.elements:
        assert not {"src", "href", "srcset", "action", "data"} & attrs.keys(), tag
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    policies = [attrs["content"] for _, attrs in found.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])


def test_the_script_sets_user_text_only_as_text() -> None:
    template = files("ncn").joinpath("assets/scan_page.html").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", template)


def test_sixty_tokens_stay_under_100_kb(tmp_path: Path) -> None:
    scan = make_scan([" word"] * 60, layers=6, heads=8)
    both = Scan(
        **{
            **vars(scan),
            "signals": scan.signals | {"head_gate": scan.signals["precision"]},
            "neutral": scan.neutral | {"head_gate": 1.0},
            "bounds": scan.bounds | {"head_gate": (0.25, 4.0)},
        }
    )
    assert both.save(tmp_path / "scan.html").stat().st_size < 100_000


def test_the_controls_have_names_and_the_maps_can_be_reached_by_keyboard() -> None:
    found = Elements(page(make_scan(["a"])))
    maps = next(attrs for _, attrs in found.elements if attrs.get("id") == "maps")
    assert maps["tabindex"] == "0"
    assert maps["aria-label"]
    assert next(attrs for _, attrs in found.elements if attrs.get("id") == "tip")["aria-live"] == "polite"
    labels = [tag for tag, _ in found.elements].count("label")
    assert labels == sum(tag in ("select", "input") for tag, _ in found.elements)
