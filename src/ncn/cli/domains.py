"""`ncn domains`: two domains in one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import (
    JobsOption,
    PresetOption,
    RecipeFileOption,
    SharedSettings,
    app,
    parse_count,
    recipe_source,
    stoppable,
)


@app.command()
def domains(
    data: Annotated[Path, typer.Option(help="Dataset folder made by `ncn prepare A B --task a --task b`.")],
    valid: Annotated[Path, typer.Option(help="Held-out text of the same two tasks, prepared with --tokenizer DATA.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    settings: SharedSettings = None,
    preset: PresetOption = None,
    config: RecipeFileOption = None,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 3,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a run on both domains, or on the first. [default: recipe's]")
    ] = None,
    second_tokens: Annotated[
        str | None, typer.Option(help="Tokens of the second domain after the first. [default: half of a run]")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also run the plain model, widened.")] = False,
    jobs: JobsOption = None,
) -> None:
    """Train on two domains together, and on one after the other: losses, signals by domain, and what is forgotten.

    The same command again goes on where an interrupted one stopped.
    """
    source = recipe_source(preset, config)
    from ncn.experiments.domains.run import run_domains

    changes = [*(settings or []), *([f"train.tokens={parse_count(tokens)}"] if tokens else [])]
    with stoppable():
        files = run_domains(
            out,
            data=data,
            valid=valid,
            preset=source or "mini",
            settings=changes,
            seeds=seeds,
            second_tokens=parse_count(second_tokens) if second_tokens else None,
            baseline=baseline,
            workers=jobs,
        )
    for path in files:
        print(path)
