"""`ncn ab`: an A/B of the modulated model against its controls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import (
    DEFAULT_DATA,
    DEFAULT_VALID,
    DataOption,
    JobsOption,
    LauncherOption,
    PresetOption,
    RecipeFileOption,
    SharedSettings,
    ValidOption,
    app,
    check_launcher,
    parse_count,
    parse_names,
    recipe_source,
    stoppable,
)
from ncn.errors import UserError


@app.command()
def ab(
    out: Annotated[Path, typer.Option(help="Folder of the experiment.")],
    settings: SharedSettings = None,
    preset: PresetOption = None,
    config: RecipeFileOption = None,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 5,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a run, such as 200k or 3.3M. [default: recipe's]")
    ] = None,
    tune_tokens: Annotated[
        str | None, typer.Option(help="Tokens of a run that chooses the learning rate. [default: half of a run]")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Arms to run, such as baseline,static,local,ncn. [default: all]")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            help="A further arm: the NCN with changed settings, such as deep:controller.taps=[0,2]. May be repeated.",
        ),
    ] = None,
    data: DataOption = DEFAULT_DATA,
    valid: ValidOption = DEFAULT_VALID,
    eval_tokens: Annotated[
        str | None,
        typer.Option(help="About how much of --valid to measure on. [default: as much as a run is trained on]"),
    ] = None,
    jobs: JobsOption = None,
    launcher: LauncherOption = "local",
) -> None:
    """Compare the modulated model with its controls at equal size, on the same batches, each at its best learning rate.

    The same command again goes on where an interrupted one stopped.
    """
    source, chosen_launcher = recipe_source(preset, config), check_launcher(launcher)
    from ncn.experiments.ab.run import run_ab

    changes = [*(settings or [])]
    if tokens is not None:
        changes.append(f"train.tokens={parse_count(tokens)}")
    with stoppable():
        report = run_ab(
            out,
            preset=source or "mini",
            settings=changes,
            seeds=seeds,
            tune_tokens=None if tune_tokens is None else parse_count(tune_tokens),
            arms=None if arms is None else parse_names(arms),
            variants=dict(parse_variant(text) for text in variant or []),
            data=data,
            valid=valid,
            eval_tokens=None if eval_tokens is None else parse_count(eval_tokens),
            launcher=chosen_launcher,
            workers=jobs,
        )
    print(f"\n{report.sentence}")
    for warning in report.warnings:
        print(f"take care: {warning}")
    for path in report.files:
        print(path)


def parse_variant(text: str) -> tuple[str, list[str]]:
    """NAME:KEY=VALUE,KEY=VALUE; commas inside brackets belong to the value."""
    name, colon, settings = text.partition(":")
    if not colon:
        raise UserError(f"a variant is written NAME:key=value,key=value, got {text!r}")
    return name.strip(), [part for part in re.split(r",(?![^\[\]{}]*[\]}])", settings) if part.strip()]
