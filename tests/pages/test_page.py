"""A page: the same words in Markdown and in HTML, with its pictures inside."""

import base64
from pathlib import Path

from ncn.pages.page import table, write_page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_the_page_holds_its_pictures_and_tables(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(PIXEL)
    text = "Found **one**.\n\n" + table(["arm", "loss"], [["a|b", "1.0"]]) + "\n![a dot](figure.png)\n"
    markdown, page = write_page(tmp_path / "report.md", "A < B", text)
    assert markdown.read_text().startswith("# A < B\n\nFound **one**.")
    html = page.read_text()
    (tmp_path / "figure.png").unlink()
    assert base64.b64encode(PIXEL).decode() in html
    assert "<td>a|b</td>" in html
    assert "<strong>one</strong>" in html
    assert "<title>A &lt; B</title>" in html
    assert "http" not in html


def test_html_in_the_text_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    _, page = write_page(tmp_path / "report.md", "Title", "A prompt: <script>alert(1)</script>")
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()
