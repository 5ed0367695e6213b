"""`ncn adapt`: a controller on a base, beside the usual adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app, parse_count, parse_names, stoppable


@app.command()
def adapt(
    base: Annotated[str, typer.Argument(help="Transformers model, a folder or hub name; it does not change.")],
    data: Annotated[Path, typer.Option(help="Dataset folder of the new domain, to train on.")],
    valid: Annotated[Path, typer.Option(help="Dataset folder of the new domain, to measure on.")],
    old: Annotated[Path, typer.Option(help="Dataset folder of the domain that the base comes from.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of controller and training, such as controller.taps=[0,3] batch_size=8."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the experiment.")] = Path("adaptation"),
    methods: Annotated[
        str, typer.Option(help="What is compared; full fine-tuning is the ceiling.")
    ] = "ncn,lora,ia3,prefix,full",
    tokens: Annotated[str, typer.Option(help="Tokens of a run, such as 200k or 3.3M.")] = "200k",
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    rank: Annotated[
        int | None,
        typer.Option(help="LoRA's rank, which the other sizes follow; default: nearest to the controller's size."),
    ] = None,
    eval_tokens: Annotated[str, typer.Option(help="About how much of --valid and --old is read.")] = "60k",
) -> None:
    """Adapt a base to text of another kind, with a controller, with LoRA, IA3 and prefix tuning, and as a whole.

    Equal parameters, equal batches, each method at its best learning rate: what is gained on the new domain and lost
    on the old one, and what it costs. All data is prepared with the base's tokenizer. The same command again goes on
    where an interrupted one stopped.
    """
    from ncn.experiments.adaptation.run import run_adaptation

    with stoppable():
        report = run_adaptation(
            base,
            out,
            data=data,
            valid=valid,
            old=old,
            methods=parse_names(methods),
            settings=[f"tokens={parse_count(tokens)}", *(settings or [])],
            seeds=seeds,
            rank=rank,
            eval_tokens=parse_count(eval_tokens),
        )
    print(f"\n{report.sentence}")
    for path in report.files:
        print(path)
