"""What sliders do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app


@app.command()
def steer(
    model: Annotated[str, typer.Argument(help="Run folder or saved folder of a model with sliders.")],
    data: Annotated[Path, typer.Option(help="Held-out dataset folder made by `ncn prepare --attributes`.")],
    out: Annotated[Path, typer.Option(help="Folder for the page, its figure and the numbers.")] = Path("steering"),
    prompts: Annotated[int, typer.Option(help="Beginnings of documents to go on from.")] = 200,
    seeds: Annotated[int, typer.Option(help="Stories for each beginning and value.")] = 3,
) -> None:
    """Measure what each slider does: it is set to seven values, and the stories that come out are measured."""
    from ncn.data import TokenDataset
    from ncn.experiments.steer import steer as run
    from ncn.store import load

    loaded, tokenizer = load(model)
    found = run(loaded, tokenizer, TokenDataset.open(data), prompts=prompts, seeds=seeds, progress=True)
    paths = found.save(out)
    for name, slider in found.results["sliders"].items():
        print(f"{name:20s} Spearman {slider['spearman']:+.2f}, of the means {slider['spearman_of_means']:+.2f}")
    for path in paths:
        print(path)
