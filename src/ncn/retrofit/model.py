"""A base with its controller in the manners of our own model: to train, evaluate, generate, scan and diagnose.

Parameters and state are the controller's alone. The base stays in evaluation mode, also in training: its weights do not
learn, so its dropout would only be noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.controller.inputs import check_inputs
from ncn.core.interface import LanguageModel, embedded
from ncn.core.signals.table import Frozen
from ncn.core.types import ControlInputs, Hidden, TokenIds
from ncn.errors import UserError
from ncn.retrofit.attach import AttachedController
from ncn.retrofit.cache import BaseCache


class RetrofittedModel(LanguageModel):
    """A base and the handle of its controller."""

    handle: AttachedController
    base: PreTrainedModel

    def __init__(self, handle: AttachedController, config: NCNConfig, base_name: str) -> None:
        super().__init__()
        self.config, self.base_name = config, base_name
        self.controller = handle.controller
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
        if cache is not None and not isinstance(cache, BaseCache):
            raise UserError("a controller on a base reads with a cache of the base's: make it with model.new_cache()")
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
