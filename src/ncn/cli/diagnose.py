"""`ncn diagnose`: the statistics of the control signals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import DEFAULT_MODEL, DEFAULT_VALID, DataOption, ModelArgument, app, open_dataset


@app.command()
def diagnose(
    model: ModelArgument = DEFAULT_MODEL,
    data: DataOption = DEFAULT_VALID,
    out: Annotated[Path, typer.Option(help="Folder for the page, its figures and the numbers.")] = Path("diagnosis"),
    max_tokens: Annotated[
        int | None, typer.Option(help="About how many tokens to read, spread over the documents. [default: 32768]")
    ] = None,
) -> None:
    """Say what the control signals do over a corpus, and whether they do anything: a verdict, and a page of figures."""
    import tempfile

    from ncn.diagnosis import DEFAULT_TOKENS
    from ncn.diagnosis import diagnose as run
    from ncn.diagnosis.readers import reader_of
    from ncn.inference.reading import check_vocabulary
    from ncn.models.saved import load
    from ncn.training.run_folder import RunFolder

    loaded, tokenizer = load(model)
    reader = reader_of(loaded)  # a model without signals is refused before its text is prepared
    metrics = RunFolder(model).metrics()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data, tokenizer, Path(scratch) / "data")
        check_vocabulary(loaded, dataset)
        found = run(
            reader,
            dataset,
            tokenizer,
            max_tokens=DEFAULT_TOKENS if max_tokens is None else max_tokens,
            metrics=metrics,
            name=Path(model).name,
            data_name=Path(data).name,
            progress=True,
        )
    paths = found.save(out)
    print("\n".join(found.verdict))
    for name, sentence in found.results["verdict"]["signals"].items():
        print(f"  {name} {sentence}")
    for path in paths:
        print(path)
