"""`ncn train`: training one model, or going on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ncn.cli.app import PresetOption, RecipeFileOption, app, describe_settings, recipe_source, stoppable
from ncn.config.recipe import Recipe


@app.command(epilog=describe_settings())
def train(
    data: Annotated[Path, typer.Option(help="Dataset folder made by `ncn prepare`.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as learning_rate=3e-3 controller.taps=[0,2].")
    ] = None,
    preset: PresetOption = None,
    config: RecipeFileOption = None,
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
    source = recipe_source(preset, config)
    changes = [*(settings or [])]
    changes += ["model.controller=null"] if baseline else []
    changes += ["train.compile=true"] if compile_model else []
    # A run that is resumed without further words goes on with its own recipe.
    begun = out / "config.json" if resume and (out / "config.json").is_file() else None
    if base:
        from ncn.retrofit.recipe import retrofit_recipe

        source = source or begun
        recipe = retrofit_recipe(base, changes, Recipe.read(source) if source else None)
    else:
        recipe = Recipe.read(source or begun or "mini")
        if start and not (source or begun):
            from ncn.models.saved import find, read_config

            recipe = recipe.model_copy(update={"model": read_config(find(start))})
        recipe = recipe.with_settings(changes)
    from ncn.machine.files import flat
    from ncn.training.train import train as run

    with stoppable("give the same command with --resume"):
        summary = run(recipe, data, out, valid=valid, start=start, resume=resume)
    for key, value in flat(summary).items():
        text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{key:26s} {text}")
