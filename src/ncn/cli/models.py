"""Verbs for one model: prepare its text, train it, use it, look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ncn.cli.app import (
    DEFAULT_MODEL,
    app,
    describe_settings,
    fail,
    format_size,
    model_and_text,
    open_dataset,
    read_text,
)
from ncn.config import Recipe, presets
from ncn.errors import UserError

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the layers' matrices, AdamW for the rest"}


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
    from ncn.attributes import TABLE, check_columns, write_attributes
    from ncn.prepare import prepare as run

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


@app.command(epilog=describe_settings())
def train(
    data: Annotated[Path, typer.Option(help="Dataset folder made by `ncn prepare`.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as learning_rate=3e-3 controller.taps=[0,2].")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(presets())}. [default: mini]")] = None,
    config: Annotated[Path | None, typer.Option(help="Or a recipe file, YAML or JSON.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Train a controller on this transformers model, a folder or hub name; it does not change."),
    ] = None,
    valid: Annotated[Path | None, typer.Option(help="Dataset folder to validate on.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Begin at the weights of this trained model, whose settings are then the default."),
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Train without a controller.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, bit for bit.")] = False,
) -> None:
    """Train a model. Ctrl-C saves the state and says how to go on."""
    if preset and config:
        raise UserError("give --preset or --config, not both; a recipe file may itself hold `preset: NAME`")
    changes = [*(settings or [])]
    changes += ["model.controller=null"] if baseline else []
    changes += ["train.compile=true"] if compile_model else []
    # A run that is resumed without further words goes on with its own recipe.
    begun = out / "config.json" if resume and (out / "config.json").is_file() else None
    if base:
        from ncn.retrofit.model import retrofit_recipe

        recipe = retrofit_recipe(base, changes, Recipe.read(source) if (source := config or preset or begun) else None)
    else:
        recipe = Recipe.read(source := config or preset or begun or "mini")
        if start and source == "mini" and not preset:
            from ncn.store import find, read_config

            recipe = recipe.model_copy(update={"model": read_config(find(start))})
        recipe = recipe.with_settings(changes)
    from ncn.runs import flat
    from ncn.stopping import Interrupted
    from ncn.train import train as run

    try:
        summary = run(recipe, data, out, valid=valid, start=start, resume=resume)
    except Interrupted as stop:
        fail(f"{stop}; to go on, give the same command with --resume", 130)
    for key, value in flat(summary).items():
        text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{key:26s} {text}")


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
    from ncn.decoupling import Decoupling
    from ncn.generate import generate as run
    from ncn.store import load

    decoupling = None if decouple is None else Decoupling.read(decouple, guidance)
    model, tokenizer = load(model_name)
    sliders = dict(map(_slider, settings or []))
    if decoupling is not None:
        decoupling.check_sliders(model.config.controller.sliders if model.config.controller else ())
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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, saved folder, bundled model or hub name.")] = DEFAULT_MODEL,
    data: Annotated[
        str, typer.Option(help="Dataset folder, or any source that `ncn prepare` reads.")
    ] = "tinystories-sample-valid",
    context: Annotated[int | None, typer.Option(help="Window in tokens; default: the model's context.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Loss, perplexity and bits per byte, by position, and with the signals frozen to neutral and to their mean."""
    import tempfile

    from ncn.evaluate import causal_value, freezings
    from ncn.evaluate import evaluate as run
    from ncn.progress import ProgressReport
    from ncn.runs import write_json
    from ncn.store import load

    loaded, tokenizer = load(model)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data, tokenizer, Path(scratch) / "data")
        passes, targets = 1 + 2 * len(freezings(loaded)), dataset.tokens - 1
        tokens = targets if max_tokens is None else min(max_tokens, targets)
        with ProgressReport("evaluate", passes * tokens, enabled=True) as bar:
            options: dict[str, Any] = {"context": context, "max_tokens": max_tokens, "bar": bar}
            whole = run(loaded, dataset, **options)
            frozen = causal_value(loaded, dataset, **options) if loaded.config.controller else {}
    print(f"{model} on {data}: {whole.tokens:,} tokens")
    figures = f"perplexity {whole.perplexity:.3f}, {whole.bits_per_byte:.4f} bits per byte"
    print(f"loss {whole.loss:.4f} nats a token, {figures}")
    print("\ntokens before     loss")
    for position, loss in whole.by_position.items():
        print(f"{position:>13s} {loss:8.4f}")
    if frozen:
        print("\nsignals frozen    at neutral   at their mean   (loss in nats a token, and the change)")
        for name, values in frozen.items():
            columns = [f"{value.loss:.4f} ({value.loss - whole.loss:+.4f})" for value in values.values()]
            print(f"{name:13s} {columns[0]:>16s} {columns[1]:>16s}")
    if json_out:
        changed = {name: {kind: value.as_dict() for kind, value in kinds.items()} for name, kinds in frozen.items()}
        write_json(json_out, {"model": model, "data": data, "evaluation": whole.as_dict(), "frozen": changed})


@app.command()
def scan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] TEXT", help=f"Model (default: {DEFAULT_MODEL}) and text; with --file no text."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="Files to write (.png, .html, .json). [default: scan.png, scan.html]")
    ] = None,
) -> None:
    """Make a brain scan: every control signal at every token, and the surprisal of each token."""
    if file:
        if words and len(words) > 1:
            raise UserError("give a text or --file, not both")
        model_name, text = (words[0] if words else DEFAULT_MODEL), read_text(file)
    else:
        model_name, text = model_and_text(words or [], "TEXT")
    from ncn.scanner import scan as run
    from ncn.store import load

    model, tokenizer = load(model_name)
    picture = run(model, tokenizer, text, name=Path(model_name).name)
    for path in out or [Path("scan.png"), Path("scan.html")]:
        picture.save(path)
        print(path)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Preset, recipe file, run folder, saved folder or bundled model.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings to change, such as num_layers=4.")] = None,
) -> None:
    """Parameters by part, the controller's share, FLOPs a token, and bytes of weights, optimiser and cache."""
    from ncn.costs import costs
    from ncn.runs import RunFolder
    from ncn.store import CONTROLLER, find, read_config

    if name in presets() or Path(name).suffix in {".yaml", ".yml", ".json"}:
        recipe = Recipe.read(name, settings or [])
        config, optimizer = recipe.model, recipe.train.optimizer
    else:
        if settings:
            raise UserError(f"{name} is a trained model: settings can only be changed in a preset or a recipe file")
        folder = find(name)
        if (folder / CONTROLLER).is_file():
            _info_on_a_base(name, folder)
            return
        config = read_config(folder)
        # A saved folder does not say how it was trained, and its config.json is no recipe.
        trained = (Path(name) / "env.json").is_file() and (Path(name) / "config.json").is_file()
        optimizer = RunFolder.open(name).recipe().train.optimizer if trained else "adamw"
    found = costs(config, optimizer)
    total_flops = sum(found.flops.values())
    total = found.total_parameters
    print(f"{name}: {total:,} parameters, context {config.context_length}, vocabulary {config.vocab_size:,}\n")
    rows = {part: (found.parameters.get(part, 0), found.flops.get(part, 0)) for part in found.parameters | found.flops}
    for part, (count, flops) in {**rows, "together": (total, total_flops)}.items():
        print(
            f"{part:13s} {count:>15,} parameters {count / total:7.2%}"
            f" {flops / 1e6:>12,.2f} MFLOPs a token {flops / total_flops:7.2%}"
        )
    cache = found.cache_bytes_per_token * config.context_length
    print(f"\ncontroller    {found.controller_share:.2%} of the parameters")
    print(f"training      {3 * total_flops / 1e6:,.1f} MFLOPs a token (forward and backward, at a full context)")
    weights = found.weight_bytes
    print(f"weights       {format_size(weights)} in float32, {format_size(weights // 2)} in bfloat16")
    print(f"optimiser     {format_size(found.optimizer_bytes)} ({_OPTIMIZERS[optimizer]})")
    print(f"cache         {format_size(cache)} a sequence at full context, float32")


def _info_on_a_base(name: str, folder: Path) -> None:
    """Of a controller alone: what it is, costs and sits on, without reading its base."""
    from ncn.costs import controller_parameters
    from ncn.retrofit.files import read_controller

    config, place = read_controller(folder)
    controller = config.controller
    assert controller is not None
    count = controller_parameters(config)
    print(f"{name}: a controller of {count:,} parameters on {place}\n")
    print(f"its base      width {config.d_model:,}, {config.num_layers} layers, vocabulary {config.vocab_size:,}")
    print(f"signals       {', '.join(controller.signals)}")
    for what in ("sliders", "tasks"):
        if names := getattr(controller, what):
            print(f"{what:13s} {', '.join(names)}")
    print(f"weights       {format_size(4 * count)} in float32, {format_size(2 * count)} in bfloat16")
    print(f"optimiser     {format_size(8 * count)} (AdamW)")
