"""`ncn report`: the report of an A/B."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Experiment folder made by `ncn ab`.")]) -> None:
    """Write the report of an experiment, finished or not, to DIR/report: numbers, figures, and a page to read."""
    from ncn.experiments.ab.report import report as run

    result = run(folder)
    print(result.sentence)
    if result.missing:
        print(f"not final: {result.missing}")
    for warning in result.warnings:
        print(f"take care: {warning}")
    for path in result.files:
        print(path)
