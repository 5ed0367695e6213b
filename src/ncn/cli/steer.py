"""`ncn steer`: what sliders do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ncn.cli.app import DEFAULT_VALID, app, open_dataset

if TYPE_CHECKING:
    from ncn.data.dataset import TokenDataset
    from ncn.data.tokenizer import Tokenizer


@app.command()
def steer(
    model: Annotated[str, typer.Argument(help="Run folder or saved folder of a model with sliders.")],
    data: Annotated[
        str,
        typer.Option(
            help="Held-out dataset folder made by `ncn prepare --attributes`, or any source that `ncn prepare` reads."
        ),
    ] = DEFAULT_VALID,
    out: Annotated[
        Path, typer.Option(help="Folder for the page, its figures, the numbers, and what is measured so far.")
    ] = Path("steering"),
    against: Annotated[
        list[str] | None, typer.Option(help="Another model with the same sliders, to compare with; repeatable.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A model without sliders: what leaving them unset costs; repeatable.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="An independent model, whose bits per byte say how fluent the stories are.")
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance to write with; repeatable. Default: 1.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Beginnings of documents to go on from.")] = 200,
    seeds: Annotated[int, typer.Option(help="Stories for each beginning and value.")] = 3,
    others: Annotated[
        float | None, typer.Option(help="What the sliders that are not measured are set to. Default: unset.")
    ] = None,
    decouple: Annotated[
        Path | None,
        typer.Option(
            help="The steer.json of an earlier measurement with --others 0.5: move the others with a slider, such "
            "that its own attribute changes alone."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Stories written at once.")] = 300,
    report: Annotated[
        bool, typer.Option(help="Write the page; without it, only measure, and keep what is found.")
    ] = True,
) -> None:
    """Measure what each slider does: it is set to seven values, and the stories that come out are measured.

    What is measured for one slider of one model is kept; the same command after a kill goes on from there.
    """
    from ncn.errors import UserError
    from ncn.experiments.steering.run import steer as run
    from ncn.models.saved import load

    def named(paths: list[str]) -> dict[str, str]:
        return {Path(path).resolve().name if Path(path).exists() else path: path for path in paths}

    models, plain = named([model, *(against or [])]), named(without or [])
    if len({*models, *plain}) != 1 + len(against or []) + len(without or []):
        raise UserError("two models have the same name: give each folder a name of its own")
    _, tokenizer = load(model)
    judging = None if judge is None else load(judge)
    found = run(
        {label: load(path)[0] for label, path in models.items()},
        tokenizer,
        _measured_data(data, tokenizer, out),
        out,
        without={label: load(path)[0] for label, path in plain.items()},
        judge=judging,
        prompts=prompts,
        seeds=seeds,
        guidances=guidance or [1.0],
        others=others,
        decouple=decouple,
        batch_size=batch_size,
        progress=True,
    )
    paths = found.save(out) if report else [out / "measured"]
    for label, measured in found.results["models"].items():
        for name, by_guidance in measured["sliders"].items():
            for strength, slider in by_guidance.items():
                own, means = slider["spearman"]["value"], slider["spearman_of_means"]
                print(f"{label:20s} {name:20s} guidance {strength}: Spearman {own:+.2f}, of the means {means:+.2f}")
    for path in paths:
        print(path)


def _measured_data(data: str, tokenizer: Tokenizer, out: Path) -> TokenDataset:
    """A dataset folder as it is; anything else is prepared and measured in `out`, once."""
    from ncn.steering.attributes import TABLE, write_attributes

    dataset = open_dataset(data, tokenizer, out / "data")
    if not Path(data).is_dir() and not (out / "data" / TABLE).is_file():
        write_attributes(out / "data", progress=True)
    return dataset
