"""`ncn prepare`: text into a dataset folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import app


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text (.txt, .jsonl, .parquet, perhaps .gz or .xz), hf:OWNER/NAME, or a bundled sample: "
            "tinystories-sample, tinystories-sample-valid."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Train a byte-pair tokenizer of this size on the data.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Or use this one: gpt2, a tokenizer.json, a folder that holds one, or OWNER/NAME on the hub."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    task: Annotated[
        list[str] | None,
        typer.Option(help="Name of the task that a source's documents belong to; one for each source, in their order."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Encoding threads; default: one a core.")] = None,
    slider: Annotated[
        list[str] | None,
        typer.Option(help="Key or column of numbers to make a slider of, ranked like the attributes; repeatable."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Key or column that holds an instruction in words for each document.")
    ] = None,
    attributes: Annotated[
        bool,
        typer.Option(
            "--attributes",
            help="Also measure every document, for sliders; ranked as in the dataset that --tokenizer names, if any.",
        ),
    ] = False,
) -> None:
    """Tokenise text into a dataset folder. Run again after an interruption, it goes on where it stopped."""
    from ncn.data.prepare import prepare as run
    from ncn.steering.attributes import TABLE, check_columns, write_attributes

    check_columns(slider or [])
    manifest = run(
        sources,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        field=field,
        split=split,
        tasks=task or [],
        sliders=slider or [],
        instruction=instruction,
        workers=workers,
        progress=True,
    )
    print(
        f"{out}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.text_bytes:,} bytes of text, "
        f"vocabulary {manifest.vocab_size:,}"
    )
    if attributes or slider:
        reference = tokenizer if tokenizer and (Path(tokenizer) / TABLE).is_file() else None
        names = write_attributes(out, reference, measured=attributes, progress=True)
        print(f"attributes: {', '.join(names)}")
