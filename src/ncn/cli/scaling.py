"""`ncn efficiency` and `ncn scale`: how a loss falls with tokens and with size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import (
    DEFAULT_DATA,
    DEFAULT_VALID,
    DataOption,
    JobsOption,
    LauncherOption,
    RecipeFileOption,
    ValidOption,
    app,
    check_launcher,
    parse_count,
    recipe_source,
    stoppable,
)
from ncn.config.recipe import Recipe
from ncn.errors import UserError

SIZES = "32,64,96,128,160,192"


@app.command()
def efficiency(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run folders, CSV files with the columns tokens and loss, or `published`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, its figures and the JSON file.")] = Path("efficiency"),
    loss: Annotated[
        str, typer.Option(help="training, validation, or auto: validation where every run has it.")
    ] = "auto",
) -> None:
    """Compare what each token bought: power laws, tokens to a loss, and whether a run has converged."""
    from ncn.experiments.efficiency.run import measure, sentences, write_report

    if loss not in ("auto", "training", "validation"):
        raise UserError(f"--loss is {loss!r}; it must be auto, training or validation")
    result = measure(runs, loss=loss)  # type: ignore[arg-type]
    for warning in result.warnings:
        print(f"note: {warning}")
    for sentence in sentences(result):
        print(sentence)
    print()
    for path in write_report(result, out):
        print(path)


@app.command()
def scale(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change at every size, as for `ncn train`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the ladder; not needed with --plan.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset that every size is made from. [default: mini]")] = None,
    config: RecipeFileOption = None,
    sizes: Annotated[
        str, typer.Option(help="Widths, such as 64, each a layer deep for every 32, or width and depth, such as 64x3.")
    ] = SIZES,
    budgets: Annotated[str, typer.Option(help="Tokens of the runs; every size is run with each.")] = "250k,500k,1M",
    seeds: Annotated[int, typer.Option(help="Runs in every place of the ladder.")] = 1,
    data: DataOption = DEFAULT_DATA,
    valid: ValidOption = DEFAULT_VALID,
    also: Annotated[
        list[Path] | None, typer.Option(help="A finished ladder on the same text, to join the fit. May be repeated.")
    ] = None,
    jobs: JobsOption = None,
    launcher: LauncherOption = "local",
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the full ladder to 1 B would cost.")] = False,
    teraflops: Annotated[float, typer.Option(help="With --plan: peak TFLOP/s of a device.")] = 989.0,
    utilisation: Annotated[float, typer.Option(help="With --plan: the share of the peak that is reached.")] = 0.4,
    memory: Annotated[float, typer.Option(help="With --plan: memory of a device in GB.")] = 80.0,
    days: Annotated[float, typer.Option(help="With --plan: days that all may take.")] = 14.0,
) -> None:
    """Train baseline and NCN on a ladder of sizes and budgets, and fit the law of loss with size and data.

    The same command again goes on where an interrupted one stopped.
    """
    source, chosen_launcher = recipe_source(preset, config) or "mini", check_launcher(launcher)
    tokens = [parse_count(part) for part in budgets.split(",")]
    if plan:
        if min(teraflops, utilisation, memory, days) <= 0 or utilisation > 1:
            raise UserError("--teraflops, --memory and --days must be above 0, and --utilisation between 0 and 1")
        device = {"teraflops": teraflops, "utilisation": utilisation, "memory_gb": memory, "days": days}
        _print_plan(source, settings or [], sizes, tokens, seeds, device)
        return
    if out is None:
        raise UserError("name the folder of the ladder with --out; or see what it would cost with --plan")
    from ncn.experiments.scaling.run import run_scale

    with stoppable():
        files = run_scale(
            out,
            preset=source,
            settings=settings or [],
            sizes=sizes,
            budgets=tokens,
            seeds=seeds,
            data=data,
            valid=valid,
            also=also or [],
            launcher=chosen_launcher,
            workers=jobs,
        )
    from ncn.machine.files import read_json

    print()
    for sentence in read_json(out / "scaling.json")["sentences"]:
        print(sentence)
    for path in files:
        print(path)


def _print_plan(
    source: str | Path, settings: list[str], sizes: str, budgets: list[int], seeds: int, device: dict[str, float]
) -> None:
    from ncn.experiments.scaling.ladder import Device, build_ladder, describe_full_plan, full_plan

    rungs = build_ladder(Recipe.read(source, settings), sizes)
    name = "an H100" if device["teraflops"] == Device.teraflops else "a device"
    print(describe_full_plan(full_plan(rungs, budgets, seeds, Device(name, **device))))
