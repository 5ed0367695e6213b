"""A page of prose, tables and figures: written as Markdown, and beside it as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ncn.machine.files import write_atomically

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom-color: #888; }
blockquote { margin: 1rem 0; padding: 0.2rem 1rem; border-left: 4px solid #0072b2; background: #f3f7fa; }
code { font-size: 0.9em; background: #f4f4f4; padding: 0 0.2em; }
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others, which hold figures, to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def origin(environment: Mapping[str, Any], command: str = "") -> str:
    """A closing section that says what made a page: the command, the machine, the versions and the commit.

    Args:
        environment: as `ncn.machine.environment.describe_environment` gives it.
        command: where it is not the one that `environment` names.
    """
    commit = environment.get("commit")
    made_from = f", commit {commit[:12]}{' with changes' if environment.get('dirty') else ''}" if commit else ""
    device, torch = environment.get("device", "an unnamed device"), environment.get("torch", "unknown")
    line = command or shlex.join(environment["command"])
    return f"## Where this comes from\n\n`{line}` on {device}, PyTorch {torch}{made_from}."


def write_page(path: Path, title: str, text: str) -> list[Path]:
    """Write `text`, Markdown without its first heading, to `path` (.md) and to the HTML file of the same name.

    Pictures are named relative to the page, `![what it shows](figure.png)`, and are embedded in the HTML file, which
    needs nothing else and loads nothing from elsewhere. HTML in the text is shown, not obeyed. Returns both paths.
    """
    source = f"# {title}\n\n{text.strip()}\n"
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(source)
    for token in _all(tokens):
        if token.type == "image":
            picture = path.parent / str(token.attrs["src"])
            token.attrs["src"] = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    document = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )
    page = path.with_suffix(".html")
    write_atomically(page, document)
    write_atomically(path, source)
    return [path, page]


def _all(tokens: Iterable[Token]) -> Iterable[Token]:
    for token in tokens:
        yield token
        yield from _all(token.children or [])
