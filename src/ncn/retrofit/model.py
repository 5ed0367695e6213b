"""A base with its controller in the manners of our own model: to train, evaluate, generate, scan and diagnose.

Parameters and state are the controller's alone. The base stays in evaluation mode, also in training: its weights do not
learn, so its dropout would only be noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ncn.config.model import CONTROLLER, NCNConfig
from ncn.config.recipe import Recipe
from ncn.core.cache import Cache
from ncn.core.controller.inputs import check_inputs
from ncn.core.interface import LanguageModel, embedded
from ncn.core.signals.table import Frozen
from ncn.core.types import ControlInputs, Hidden, TokenIds
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import HUB_FILES, Tokenizer
from ncn.errors import UserError
from ncn.machine.files import read_json
from ncn.machine.hub import from_hub, is_hub_name
from ncn.retrofit.attach import AttachedController, attach
from ncn.retrofit.cache import BaseCache
from ncn.retrofit.families import core_config
from ncn.retrofit.loading import load_controller

TRAINING = {"tokens": 1_000_000, "batch_size": 8, "context": 256, "learning_rate": 1e-2}
"""What a controller on a base is trained with unless the recipe says otherwise."""


class RetrofittedModel(LanguageModel):
    """A base and the handle of its controller."""

    handle: AttachedController
    base: PreTrainedModel

    def __init__(self, handle: AttachedController, config: NCNConfig, base_name: str) -> None:
        super().__init__()
        self.config, self.base_name = config, base_name
        self.controller, self.layout, self.checkpointing = handle.controller, handle.layout, False
        self.__dict__.update(handle=handle, base=handle.model)  # out of the registered modules

    @property
    def core_config(self) -> NCNConfig:
        """The base's form and its controller's."""
        return self.config

    def embed(self, input_ids: TokenIds) -> Hidden:
        """The base's embeddings."""
        return embedded(self.base.get_input_embeddings(), input_ids, self.config.vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """The base's output matrix."""
        weight: Tensor = self.base.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        return weight

    @property
    def logit_cap(self) -> float | None:  # type: ignore[override]
        """Where the base's logits level off, as Gemma 2's do."""
        cap: float | None = getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)
        return cap

    def train(self, mode: bool = True) -> RetrofittedModel:
        """Training mode is the controller's alone."""
        super().train(mode)
        self.base.eval()  # type: ignore[no-untyped-call]
        return self

    def hidden_states(
        self,
        embeddings: Hidden,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
        frozen: Frozen | None = None,
        control: ControlInputs | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in our own model; the cache is filled on the side with a transformers cache, which holds everything."""
        start, tokens = 0 if cache is None else cache.length, embeddings.shape[1]
        if start + tokens > self.config.context_length:
            raise UserError(
                f"{start + tokens} tokens do not fit into the base's context of {self.config.context_length}; "
                "shorten the text"
            )
        assert cache is None or isinstance(cache, BaseCache)
        if control is not None:
            check_inputs(control, self.config)
        options = self._padding(attention_mask, cache, embeddings)
        with self.handle.frozen_at(frozen or {}), self.handle.fed_by(lambda *_: control):
            hidden: Tensor = self.handle.decoder(
                inputs_embeds=embeddings,
                past_key_values=None if cache is None else cache.base,
                use_cache=cache is not None,
                **options,
            ).last_hidden_state
        if cache is not None:
            cache.advance(tokens)
        return hidden, dict(self.handle.signals)

    def new_cache(self, capacity: int = 0, *, joins: bool = False) -> BaseCache:
        """As `LanguageModel.new_cache`; where layers look back only so far, a cache that will be joined keeps all."""
        config = self.base.config.get_text_config()
        return BaseCache(DynamicCache() if joins else DynamicCache(config=config))

    def _padding(self, mask: Tensor | None, cache: BaseCache | None, embeddings: Hidden) -> dict[str, Tensor | None]:
        """What the base must know of padding: the mask of all slots, and the tokens' positions without it."""
        held = None if cache is None else cache.real_slots()
        if mask is None and (held is None or bool(held.all())):
            return {"attention_mask": None}
        batch, tokens = embeddings.shape[:2]
        own = torch.ones(batch, tokens, dtype=torch.bool, device=embeddings.device) if mask is None else mask
        if cache is not None and cache.length:
            before = torch.ones_like(own[:, :1]).expand(-1, cache.length) if held is None else held
            own = torch.cat([before, own], 1)
        positions = (own.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        return {"attention_mask": own, "position_ids": positions}

    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """The controller, and where its base is; in the number format that it has."""
        self.handle.save(folder, base_name=self.base_name)


def retrofit_recipe(base: str | Path, settings: Iterable[str] = (), recipe: Recipe | None = None) -> Recipe:
    """The recipe that trains a controller on `base`, a folder or the name of a repository on the hub.

    Controller and training are those of `recipe`, or those made for this purpose; then come `settings`, as in
    `Recipe.read`. The model's shape is the base's.
    """
    found = _read_base(base, AutoConfig)
    context = min(found.get_text_config().max_position_embeddings, TRAINING["context"])
    made = recipe or Recipe.parse({"model": _shape(found), "train": TRAINING | {"context": context}})
    made = Recipe.parse(made.model_dump() | {"base": _place(base)})
    made = made.with_settings(settings)
    if made.model.controller is None:
        raise UserError("a base is trained with a controller or not at all; leave out --baseline")
    return made.model_copy(update={"model": made.model.override(**_shape(found))})


def build_retrofitted(recipe: Recipe, device: torch.device) -> RetrofittedModel:
    """The base of a recipe with a new controller on it."""
    assert recipe.base is not None
    assert recipe.model.controller is not None
    base = load_base(recipe.base)
    base.to(device)  # type: ignore[arg-type]
    return RetrofittedModel(attach(base, recipe.model.controller), recipe.model, recipe.base)


def load_retrofitted(folder: Path) -> tuple[RetrofittedModel, Tokenizer]:
    """A controller with the base that it was trained on, and the tokenizer. Raises `UserError` where they are gone."""
    place = read_json(folder / CONTROLLER).get("base_name")
    if not isinstance(place, str):
        raise UserError(f"{folder} does not say where its base is; load the base, then ncn.load_controller(base, path)")
    base = load_base(place)
    handle = load_controller(base, folder)
    tokenizer = Tokenizer.load(folder)
    shape = NCNConfig.parse(_shape(base.config) | {"separator_id": tokenizer.separator_id})
    return RetrofittedModel(handle, shape.override(controller=handle.config), place).eval(), tokenizer


def _shape(config: Any) -> dict[str, Any]:
    config = config.get_text_config()
    shape = core_config(config, None, config.num_hidden_layers)
    return shape.model_dump(exclude={"controller", "separator_id"}) | {
        "context_length": config.max_position_embeddings,
    }


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


def load_base(place: str | Path) -> PreTrainedModel:
    """A base in float32 and evaluation mode, from a folder or the hub; raises `UserError` where there is none."""
    model: Any = _read_base(place, AutoModelForCausalLM, dtype=torch.float32)
    found: PreTrainedModel = model.eval()
    return found


def _read_base(place: str | Path, loader: Any, **options: Any) -> Any:
    try:
        return loader.from_pretrained(str(place), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"no base model at {str(place)!r} that transformers can load: {reason}") from None


def _place(base: str | Path) -> str:
    path = Path(base)
    return str(path.resolve()) if path.is_dir() else str(base)
