"""`ncn evaluate`, `ncn scan` and `ncn info`: looking at one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ncn.cli.app import (
    DEFAULT_MODEL,
    DEFAULT_VALID,
    DataOption,
    ModelArgument,
    app,
    format_size,
    model_and_text,
    open_dataset,
    read_text,
)
from ncn.config.presets import presets
from ncn.config.recipe import Recipe
from ncn.errors import UserError

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the layers' matrices, AdamW for the rest"}


@app.command()
def evaluate(
    model: ModelArgument = DEFAULT_MODEL,
    data: DataOption = DEFAULT_VALID,
    context: Annotated[int | None, typer.Option(help="Window in tokens; default: the model's context.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Loss, perplexity and bits per byte, by position, and with the signals frozen to neutral and to their mean."""
    import tempfile

    from ncn.inference.evaluate import evaluate as run
    from ncn.inference.freezing import causal_value, freezings
    from ncn.machine.files import write_json
    from ncn.machine.progress import ProgressReport
    from ncn.models.saved import load

    loaded, tokenizer = load(model)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data, tokenizer, Path(scratch) / "data")
        passes, targets = 1 + 2 * len(freezings(loaded)), dataset.tokens - 1
        tokens = targets if max_tokens is None else min(max_tokens, targets)
        with ProgressReport("evaluate", passes * tokens, enabled=True) as bar:
            options: dict[str, Any] = {"context": context, "max_tokens": max_tokens, "bar": bar}
            whole = run(loaded, dataset, **options)
            frozen = causal_value(loaded, dataset, **options) if loaded.core_config.controller else {}
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
    from ncn.models.saved import load
    from ncn.scans.recording import scan as run

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
    from ncn.config.model import CONTROLLER
    from ncn.core.costs import costs
    from ncn.models.saved import find, read_config
    from ncn.training.run_folder import RunFolder

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
    from ncn.core.parameters import controller_parameters
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
