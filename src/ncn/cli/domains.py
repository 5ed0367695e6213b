"""Two domains in one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app, fail
from ncn.config.presets import presets
from ncn.errors import UserError


@app.command()
def domains(
    data: Annotated[Path, typer.Option(help="Dataset folder made by `ncn prepare A B --task a --task b`.")],
    valid: Annotated[Path, typer.Option(help="Held-out text of the same two tasks, prepared with --tokenizer DATA.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change in all arms, as for `ncn train`.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(presets())}. [default: mini]")] = None,
    config: Annotated[Path | None, typer.Option(help="Or a recipe file, YAML or JSON.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 3,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a run on both domains, or on the first. [default: recipe's]")
    ] = None,
    second_tokens: Annotated[
        str | None, typer.Option(help="Tokens of the second domain after the first. [default: half of a run]")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also run the plain model, widened.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; default: one a core, or one a device.")] = None,
) -> None:
    """Train on two domains together, and on one after the other: losses, signals by domain, and what is forgotten.

    The same command again goes on where an interrupted one stopped.
    """
    if preset and config:
        raise UserError("give --preset or --config, not both; a recipe file may itself hold `preset: NAME`")
    from ncn.cli.app import parse_count
    from ncn.experiments.domains.run import run_domains
    from ncn.machine.stopping import Interrupted

    changes = [*(settings or []), *([f"train.tokens={parse_count(tokens)}"] if tokens else [])]
    try:
        files = run_domains(
            out,
            data=data,
            valid=valid,
            preset=config or preset or "mini",
            settings=changes,
            seeds=seeds,
            second_tokens=parse_count(second_tokens) if second_tokens else None,
            baseline=baseline,
            workers=jobs,
        )
    except Interrupted as stop:
        fail(f"{stop}; to go on, give the same command again", 130)
    for path in files:
        print(path)
