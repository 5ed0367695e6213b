"""Whether a recipe, its data and the weights that it begins at belong together, and what a run is of."""

from __future__ import annotations

from pathlib import Path

from ncn.config import Recipe
from ncn.data import TokenDataset
from ncn.errors import UserError
from ncn.store import weights_fingerprint


def identify(data: TokenDataset, valid: TokenDataset | None, start: str | Path | None) -> dict[str, str | None]:
    """What a run is of, beside its recipe: fingerprints of the data and of the weights that it begins at."""
    return {
        "data": data.fingerprint,
        "validation": valid.fingerprint if valid else None,
        "start": weights_fingerprint(start) if start else None,
    }


def check_same_tokenizer(data: TokenDataset, valid: TokenDataset) -> None:
    """Raises `UserError` if the validation data was made by another tokenizer than the training data."""
    if valid.manifest.tokenizer_sha256 != data.manifest.tokenizer_sha256:
        raise UserError(
            f"{valid.folder} and {data.folder} were prepared with different tokenizers; "
            f"prepare the validation data with --tokenizer {data.folder}"
        )


def fit_to_data(recipe: Recipe, dataset: TokenDataset) -> Recipe:
    """The recipe with the vocabulary size and the separator of the data."""
    changes = {"separator_id": dataset.separator_id}
    if recipe.base is None:
        changes["vocab_size"] = dataset.vocab_size
    else:
        from ncn.retrofit.model import check_base_tokenizer

        check_base_tokenizer(recipe.base, dataset, recipe.model.vocab_size)
    model = recipe.model.override(**changes)
    context = recipe.train.context or model.context_length
    if context > model.context_length:
        raise UserError(
            f"train.context ({context}) is longer than the model's context_length ({model.context_length}); "
            "raise context_length"
        )
    return recipe.model_copy(update={"model": model})
