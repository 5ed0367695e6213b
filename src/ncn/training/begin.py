"""Beginning a run, or going on with one: recipe, data and first weights are checked, then come model and run folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ncn.config.recipe import Recipe
from ncn.core.interface import LanguageModel
from ncn.core.model import ModulatedTransformer
from ncn.core.parameters import hold_still_but_inputs
from ncn.data.dataset import TokenDataset, check_same_tokenizer
from ncn.errors import UserError
from ncn.machine.devices import arithmetic, find_device
from ncn.machine.environment import describe_environment
from ncn.models.saved import load_start, weights_fingerprint
from ncn.steering.documents import DocumentInputs
from ncn.training.run_folder import RunFolder
from ncn.training.session import Training
from ncn.training.trackers import check_installed


def identify(data: TokenDataset, valid: TokenDataset | None, start: str | Path | None) -> dict[str, str | None]:
    """What a run is of, beside its recipe: fingerprints of the data and of the weights that it begins at."""
    return {
        "data": data.fingerprint,
        "validation": valid.fingerprint if valid else None,
        "start": weights_fingerprint(start) if start else None,
    }


def fit_to_data(recipe: Recipe, dataset: TokenDataset) -> Recipe:
    """The recipe with the vocabulary size and the separator of the data."""
    changes = {"separator_id": dataset.separator_id}
    if recipe.base is None:
        changes["vocab_size"] = dataset.vocab_size
    else:
        from ncn.retrofit.recipe import check_base_tokenizer

        check_base_tokenizer(recipe.base, dataset, recipe.model.vocab_size)
    model = recipe.model.override(**changes)
    context = recipe.train.context or model.context_length
    if context > model.context_length:
        raise UserError(
            f"train.context ({context}) is longer than the model's context_length ({model.context_length}); "
            "raise context_length"
        )
    return recipe.model_copy(update={"model": model})


def begin(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None,
    start: str | Path | None = None,
    resume: bool,
) -> Training:
    """Open the data, build the model at its initial weights, and create or reopen the run folder.

    The folder comes last, so that a mistake leaves none behind.
    """
    check_installed(recipe.train.trackers)
    dataset = TokenDataset.open(data)
    dataset.tokenizer()  # a run that cannot save its tokenizer in the end should not begin
    valid_set = TokenDataset.open(valid) if valid else None
    recipe = fit_to_data(recipe, dataset)
    controller = recipe.model.controller
    if recipe.train.balance_sliders and not (controller and controller.sliders):
        raise UserError("train.balance_sliders needs sliders to balance, such as controller.sliders=[length]")
    given = DocumentInputs.of(dataset, controller, recipe.train.balance_sliders)
    tasks_alone = controller and controller.override(sliders=(), instructions=False)
    valid_inputs = DocumentInputs.of(valid_set, tasks_alone) if valid_set and valid_set.tasks else None
    context = recipe.train.context or recipe.model.context_length
    if dataset.tokens < context:
        raise UserError(
            f"the data's {dataset.tokens} tokens are less than one window of {context}; prepare more, or lower context"
        )
    device = find_device(recipe.train.device)
    autocast = arithmetic(recipe.train.precision, device)
    torch.manual_seed(recipe.train.seed if recipe.train.init_seed is None else recipe.train.init_seed)
    model = _build(recipe, device)
    if valid_set:
        check_same_tokenizer(dataset, valid_set)
    identity = identify(dataset, valid_set, start)
    if recipe.train.only_inputs and (recipe.base or not start):
        why = "leave it out on a base, which is held still anyway" if recipe.base else "it needs --start MODEL"
        raise UserError(f"train.only_inputs is for a model that is trained already: {why}")
    if start:
        load_start(model, start, dataset.manifest.tokenizer_sha256)
    if recipe.train.only_inputs:
        hold_still_but_inputs(model)
    if resume and (Path(out) / "config.json").exists():
        run = RunFolder.open(out)
        run.check_unchanged(recipe, identity)
    else:
        run = RunFolder.create(out, recipe, describe_environment(device, autocast=str(autocast), **identity))
    return Training(recipe, run, dataset, valid_set, model, device, autocast, given, valid_inputs)


def _build(recipe: Recipe, device: torch.device) -> LanguageModel:
    if recipe.base is None:
        return ModulatedTransformer(recipe.model).to(device)
    from ncn.retrofit.loading import build_retrofitted

    return build_retrofitted(recipe, device)
