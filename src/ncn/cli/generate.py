"""`ncn generate`: going on with a prompt, perhaps with sliders, a task or an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ncn.cli.app import DEFAULT_MODEL, app, model_and_text
from ncn.errors import UserError


@app.command()
def generate(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help=f"Model (default: {DEFAULT_MODEL}) and prompt.")
    ],
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens; default: up to the context's end.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens with this much probability.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a slider from 0 to 1; 0.1:0.9 moves it over the text."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="One of the tasks that the model was trained with.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What to write, in words, for a model that was trained with instructions.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Above 1, exaggerate what sliders, task and instruction do.")] = 1.0,
    decouple: Annotated[
        Path | None,
        typer.Option(
            help="The steer.json of `ncn steer MODEL --others 0.5`: move all sliders together, such that each --set "
            "changes its own attribute alone."
        ),
    ] = None,
    compile_step: Annotated[
        bool, typer.Option("--compile", help="Compile a token's step: up to a minute, then about twice as fast.")
    ] = False,
) -> None:
    """Continue a prompt, streaming. MODEL is a run folder, a saved folder, a bundled model or a hub name."""
    model_name, prompt = model_and_text(words, "PROMPT")
    from ncn.inference.generate import generate as run
    from ncn.models.saved import load
    from ncn.steering.decoupling import Decoupling

    decoupling = None if decouple is None else Decoupling.read(decouple, guidance)
    model, tokenizer = load(model_name)
    sliders = dict(map(_slider, settings or []))
    if decoupling is not None:
        decoupling.check_sliders(model.core_config.controller.sliders if model.core_config.controller else ())
        sliders = decoupling(sliders)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options |= {"sliders": sliders, "task": task, "guidance": guidance}
    options |= {"instruction": instruction, "compile": compile_step}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    pieces = run(model, tokenizer, prompt, **options)
    first = next(pieces, "")  # a mistake shows before anything is printed
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _slider(text: str) -> tuple[str, float | tuple[float, float]]:
    name, _, value = text.partition("=")
    try:
        ends = [float(part) for part in value.split(":")]
    except ValueError:
        ends = []
    if not name or not 1 <= len(ends) <= 2:
        raise UserError(
            f"--set {text}: write NAME=VALUE, such as dialogue=0.9, or NAME=FROM:TO, such as dialogue=0.1:0.9"
        )
    return name, ends[0] if len(ends) == 1 else (ends[0], ends[1])
