"""The recipe that trains a controller on a base, and whether data fits to that base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig

from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import HUB_FILES, Tokenizer
from ncn.errors import UserError
from ncn.machine.hub import from_hub, is_hub_name
from ncn.retrofit.bases import read_base, shape_of

TRAINING = {"tokens": 1_000_000, "batch_size": 8, "context": 256, "learning_rate": 1e-2}
"""What a controller on a base is trained with unless the recipe says otherwise."""


def retrofit_recipe(base: str | Path, settings: Iterable[str] = (), recipe: Recipe | None = None) -> Recipe:
    """The recipe that trains a controller on `base`, a folder or the name of a repository on the hub.

    Controller and training are those of `recipe`, or those made for this purpose; then come `settings`, as in
    `Recipe.read`. The model's shape is the base's.
    """
    found = read_base(base, AutoConfig)
    context = min(found.get_text_config().max_position_embeddings, TRAINING["context"])
    made = recipe or Recipe.parse({"model": shape_of(found), "train": TRAINING | {"context": context}})
    made = Recipe.parse(made.model_dump() | {"base": _place(base)})
    made = made.with_settings(settings)
    if made.model.controller is None:
        raise UserError("a base is trained with a controller or not at all; leave out --baseline")
    return made.model_copy(update={"model": made.model.override(**shape_of(found))})


def _place(base: str | Path) -> str:
    path = Path(base)
    return str(path.resolve()) if path.is_dir() else str(base)


def check_base_tokenizer(base: str | Path, data: TokenDataset, vocab_size: int) -> None:
    """Raises `UserError` where the data was not prepared with the tokenizer beside the base, as far as there is one."""
    remedy = f"prepare it with --tokenizer {base}"
    if data.vocab_size > vocab_size:
        raise UserError(f"the data has a vocabulary of {data.vocab_size}, and the base one of {vocab_size}; {remedy}")
    place = Path(base)
    if not place.exists() and is_hub_name(str(base)):
        place = from_hub(str(base), HUB_FILES)
    if (place / "tokenizer.json").is_file() and not _same_tokens(Tokenizer.load(place), data):
        raise UserError(f"{data.folder} was prepared with another tokenizer than the base's; {remedy}")


def _same_tokens(tokenizer: Tokenizer, data: TokenDataset) -> bool:
    """Whether the data could be this tokenizer's: files of one tokenizer differ, so a sample is encoded again."""
    if tokenizer.fingerprint == data.manifest.tokenizer_sha256:
        return True
    own = data.tokenizer()
    sample = own.decode(data.read(1, min(data.tokens - 1, 1000)).tolist())
    return tokenizer.separator_id == data.separator_id and tokenizer.encode(sample) == own.encode(sample)
