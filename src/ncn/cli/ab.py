"""Experiments: an A/B of the modulated model against its controls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app, fail, parse_count
from ncn.config.presets import presets
from ncn.errors import UserError


@app.command()
def ab(
    out: Annotated[Path, typer.Option(help="Folder of the experiment.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change in all arms, as for `ncn train`.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(presets())}. [default: mini]")] = None,
    config: Annotated[Path | None, typer.Option(help="Or a recipe file, YAML or JSON.")] = None,
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
    data: Annotated[
        str, typer.Option(help="Dataset folder, or any source that `ncn prepare` reads.")
    ] = "tinystories-sample",
    valid: Annotated[str, typer.Option(help="The same, to measure on.")] = "tinystories-sample-valid",
    eval_tokens: Annotated[
        str | None,
        typer.Option(help="About how much of --valid to measure on. [default: as much as a run is trained on]"),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; default: one a core, or one a device.")] = None,
    launcher: Annotated[str, typer.Option(help="local, or ray: the runs go to a Ray cluster.")] = "local",
) -> None:
    """Compare the modulated model with its controls at equal size, on the same batches, each at its best learning rate.

    The same command again goes on where an interrupted one stopped.
    """
    if preset and config:
        raise UserError("give --preset or --config, not both; a recipe file may itself hold `preset: NAME`")
    if launcher not in ("local", "ray"):
        raise UserError(f"unknown launcher {launcher!r}; launchers: local, ray")
    from ncn.experiments.ab.run import run_ab
    from ncn.machine.stopping import Interrupted

    changes = [*(settings or [])]
    if tokens is not None:
        changes.append(f"train.tokens={parse_count(tokens)}")
    try:
        report = run_ab(
            out,
            preset=config or preset or "mini",
            settings=changes,
            seeds=seeds,
            tune_tokens=None if tune_tokens is None else parse_count(tune_tokens),
            arms=None if arms is None else [name.strip() for name in arms.split(",") if name.strip()],
            variants=dict(parse_variant(text) for text in variant or []),
            data=data,
            valid=valid,
            eval_tokens=None if eval_tokens is None else parse_count(eval_tokens),
            launcher=launcher,  # type: ignore[arg-type]  # one of the two
            workers=jobs,
        )
    except Interrupted as stop:
        fail(f"{stop}; to go on, give the same command again", 130)
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
