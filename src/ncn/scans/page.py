"""A brain scan as one interactive HTML page, which holds its data, styles and script, and loads nothing else."""

from __future__ import annotations

import html
import json
from typing import Any

from ncn.config.signals import meaning
from ncn.machine.files import ASSETS
from ncn.scans.colours import PALETTE
from ncn.scans.contents import ScanContents

DIGITS = 5  # significant digits of a value in the page: more than it shows, and half the size of all of them


def page(scan: ScanContents) -> str:
    """The page of a scan: heat maps that tell the value under the pointer, and the text coloured by one of their rows.

    The numbers are those of the scan, rounded to five significant digits.
    """
    template = (ASSETS / "scan_page.html").read_text("utf-8")
    title = "Brain scan" + (f" of {scan.model}" if scan.model else "")
    # Split before anything of the user's goes in, so that no name or text is taken for a placeholder.
    before, after = template.split("{{scan}}")
    return before.replace("{{title}}", html.escape(_encodable(title))) + _script_json(_content(scan)) + after


def _content(scan: ScanContents) -> dict[str, Any]:
    signals = []
    for name, values in scan.signals.items():
        scale = scan.scale(name)
        heads = values.shape[2] if values.ndim == 3 else 0
        rows = values.reshape(len(scan.tokens), -1).T
        signals.append(
            {
                "name": name,
                "meaning": meaning(name),
                "heads": heads,
                "neutral": scale.neutral,
                "reach": scale.reach,
                "multiplicative": scale.multiplicative,
                "values": [[_rounded(value) for value in row] for row in rows.tolist()],
            }
        )
    return {
        "palette": PALETTE,
        "tokens": scan.tokens,
        "labels": scan.labels(),
        "surprisal": [None if bits is None else _rounded(bits) for bits in scan.surprisal],
        "signals": signals,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _script_json(content: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in: "</script>" and "<!--" need a "<", which is escaped.

    It is pure ASCII, so that any string survives, also half a surrogate pair.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
