"""`ncn demo`: the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app, stoppable


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, both runs, the story and the scan.")] = Path("demo"),
    settings: Annotated[list[str] | None, typer.Argument(help="Settings to change, such as tokens=500000.")] = None,
) -> None:
    """Train `mini` and its static twin on the bundled stories, compare them, tell a story, draw a brain scan."""
    from ncn.experiments.demo.run import run_demo

    with stoppable():
        result = run_demo(out, overrides=tuple(settings or []))
    print(f"\n{'':28s}{'parameters':>12s}{'loss':>9s}{'perplexity':>12s}{'bits/byte':>11s}{'seconds':>9s}")
    for name, label in (("ncn", "with controller"), ("twin", "static twin")):
        arm = result.arms[name]
        print(
            f"{label:28s}{arm['parameters']:>12,}{arm['validation_loss']:>9.4f}{arm['validation_perplexity']:>12.3f}"
            f"{arm['validation_bits_per_byte']:>11.4f}{arm['seconds']:>9.0f}"
        )
    print(f"{'difference':49s}{'':12s}{result.difference:>+11.4f}   (one seed: no evidence by itself)")
    print(f"\n{result.story}\n")
    for path in result.files:
        print(path)
