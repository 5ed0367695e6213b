"""The transformers classes of the model: configuration, output, and the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import Cache as TransformersCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ncn.config.model import MODEL_TYPE, NCNConfig, standard_fields
from ncn.config.training import IGNORED
from ncn.core.interface import LanguageModel
from ncn.core.model import ModulatedTransformer
from ncn.core.signals.table import homeostatic_loss
from ncn.core.types import ControlInputs
from ncn.hf.cache import HostedCache
from ncn.hf.guidance import Settings, second_reading
from ncn.steering.values import InputValues, InstructionIds, SliderValues, TaskValues


@no_type_check  # by the shape checks of the tests, which do not know that __init__ takes more than the fields
class NCNConfigForTransformers(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A transformers configuration around an `NCNConfig`, which is the entry `ncn` and decides.

    The standard fields (`hidden_size`, ...) repeat it under the names that other tools read. `homeostatic_weight` is
    the λ of equation (6): that share of the homeostatic loss is added when labels are given.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the library declares it so

    ncn: dict[str, Any] | None = None
    homeostatic_weight: float = 0.0
    use_cache: bool = True
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        core = NCNConfig.preset("mini") if self.ncn is None else NCNConfig.parse(self.ncn)
        separator = core.separator_id
        self.bos_token_id = separator if self.bos_token_id is None else self.bos_token_id
        self.eos_token_id = separator if self.eos_token_id is None else self.eos_token_id
        self.pad_token_id = separator if self.pad_token_id is None else self.pad_token_id
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.set_core(core)

    @property
    def core(self) -> NCNConfig:
        """The `NCNConfig` of the model."""
        return NCNConfig.parse(self.ncn or {})

    def set_core(self, core: NCNConfig) -> None:
        """Take over an `NCNConfig`, and repeat it in the standard fields."""
        self.ncn = core.model_dump(mode="json")
        for name, value in standard_fields(core).items():
            setattr(self, name, value)


@dataclass
class NCNOutput(CausalLMOutputWithPast):
    """The library's output, and with `output_signals=True` the signals and their homeostatic loss (equation 6).

    `signals` holds tensors (batch, tokens, layers[, sites]) by name.
    """

    signals: dict[str, Tensor] | None = None
    homeostatic_loss: Tensor | None = None


class NCNForCausalLM(PreTrainedModel, GenerationMixin, LanguageModel):  # type: ignore[no-untyped-call]
    """A `ModulatedTransformer` with the manners of a transformers model.

    It has the very modules of the core model, so that tensors have the same names here, there and in the file. As a
    `LanguageModel` it reads, writes, scans and diagnoses like that.
    """

    config: NCNConfigForTransformers
    core: ModulatedTransformer
    config_class = NCNConfigForTransformers
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - the library declares it so
    _input_embed_layer = "embedding"

    def __init__(self, config: NCNConfigForTransformers) -> None:
        super().__init__(config)
        # Kept out of the registered modules, whose names would all begin with "core." otherwise; its modules are ours.
        self.__dict__["core"] = ModulatedTransformer(config.core)
        self._modules = self.core._modules
        for parameter in self.parameters():
            # The core has initialised itself; only what a file fails to replace on the meta device is left to do.
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, model: ModulatedTransformer) -> NCNForCausalLM:
        """The transformers model with a copy of the weights of `model`."""
        config = NCNConfigForTransformers(ncn=model.config.model_dump(mode="json"))
        made = cls(config)
        made.to(model.output_weight.device, model.output_weight.dtype)  # type: ignore[arg-type]
        made.load_state_dict(model.state_dict())
        made.train(model.training)
        return made

    @property
    def core_config(self) -> NCNConfig:
        return self.core.config

    @property
    def output_weight(self) -> Tensor:
        return self.core.output_weight

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.core.embed(input_ids)

    def hidden_states(self, *args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the core model, whose own cache it takes."""
        return self.core.hidden_states(*args, **options)

    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.core.write(folder, dtype)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransformersCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_signals: bool = False,
        sliders: SliderValues | None = None,
        tasks: TaskValues = None,
        instruction_ids: InstructionIds | None = None,
        **kwargs: Any,
    ) -> NCNOutput:
        """Logits, and the loss where `labels` are given (-100: no target).

        `attention_mask` (batch, tokens) is 0 at padding, and may reach back over the tokens in the cache. Positions
        follow from it, so `position_ids` are accepted and not looked at.

        `sliders`, `tasks` and `instruction_ids` are inputs of the controller from outside, for all rows or for each:
        sliders by name, `{"dialogue": 0.9}` (a list has a value for each row, a tensor (rows, places) moves along the
        sequence), or a tensor (rows, sliders), NaN where unset; tasks by name or place, -1 where unset; the token ids
        of an instruction, with -1 or the padding token where a row has fewer. `generate` takes them too.
        """
        if input_ids is not None and inputs_embeds is None:
            embeddings = self.core.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            embeddings, input_ids = inputs_embeds, self._separators(inputs_embeds)
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        self.core.checkpointing = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)

        cache = None if past_key_values is None else HostedCache(past_key_values)
        batch, tokens = embeddings.shape[:2]
        control = self._control(batch, 0 if cache is None else cache.length, tokens, sliders, tasks, instruction_ids)
        hidden, signals = self.core.hidden_states(
            embeddings,
            input_ids,
            token_mask(attention_mask, tokens),
            cache=cache,
            control=control,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.core.logits(hidden[:, kept])

        weight = self.config.homeostatic_weight
        homeostasis = homeostatic_loss(signals) if signals and (output_signals or weight) else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if homeostasis is not None and weight:
                loss = loss + weight * homeostasis * share_of_step(labels, kwargs.get("num_items_in_batch"))
        return NCNOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            signals=signals if output_signals else None,
            homeostatic_loss=homeostasis if output_signals else None,
        )

    def _control(
        self,
        batch: int,
        start: int,
        tokens: int,
        sliders: SliderValues | None,
        tasks: TaskValues,
        instruction: InstructionIds | None,
    ) -> ControlInputs | None:
        """The inputs from outside of the `tokens` places from `start` on."""
        padding = self.config.pad_token_id
        if isinstance(instruction, Tensor) and padding is not None:
            instruction = torch.where(instruction == padding, -1, instruction)
        given = InputValues.of(self.core.config, sliders, tasks, instruction)
        if given is None:
            return None
        return given.at(batch, start, tokens, self.core.output_weight.device, self.core.pool_instruction)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in the library, with the inputs from outside that `forward` takes. `guidance_scale` above 1 extrapolates
        from the same text without them to the text with them, unless a negative prompt is given."""
        settings = Settings(self, generation_config, kwargs)
        if settings.get("guidance_scale", 1) != 1:
            kwargs |= second_reading(settings, inputs, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _separators(self, embeddings: Tensor) -> Tensor:
        """Ids that say where documents begin, which is where an embedding is the separator's; -1 elsewhere."""
        separator = self.core.config.separator_id
        return torch.where((embeddings == self.core.embedding.weight[separator]).all(-1), separator, -1)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: salience must see which tokens are padding, which a 4-dimensional mask no longer says."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        # The salience state grows by a slot at each token, whatever the cache: a compiled step would be compiled anew.
        return False

    def get_output_embeddings(self) -> nn.Module:
        """The output head; when it is tied, the embedding whose matrix it shares."""
        return self.core.embedding if self.core.head is None else self.core.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        setattr(self, "embedding" if self.core.head is None else "head", new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in the library; the `NCNConfig` learns the new size too."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.core.config = self.core.config.override(vocab_size=embedding.num_embeddings)
        self.config.set_core(self.core.config)
        return embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a file lacked, as in a new model."""
        missing = {name: value for name, value in module.named_parameters(recurse=False) if not _is_initialised(value)}
        place = next((name for name, own in self.named_modules() if own is module), None)
        if place is None:  # made by the library, such as an embedding for more tokens
            super()._init_weights(module)  # type: ignore[no-untyped-call]
        elif missing:
            fresh = ModulatedTransformer(self.core.config).get_submodule(place)
            for name, value in missing.items():
                value.copy_(fresh.get_parameter(name))


def _is_initialised(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def token_mask(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the `tokens` at hand are real, from a mask that may cover those in the cache too."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be (batch, tokens), 0 at padding; got {attention_mask.ndim} dimensions. "
            "Who attends to whom follows from it, from causality and from document borders"
        )
    mask = attention_mask.bool()
    if not torch.compiler.is_compiling():
        begins = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        if (begins.sum(1) > 1).any():
            raise ValueError("attention_mask has padding inside a sequence; padding stands before or after it only")
    return mask[:, -tokens:]


def share_of_step(labels: Tensor, targets_in_step: Tensor | int | None) -> Tensor | float:
    """This batch's share of an optimiser step, whose batches' losses the Trainer adds up."""
    if targets_in_step is None:
        return 1.0
    return (labels != IGNORED).sum() / targets_in_step


AutoConfig.register(MODEL_TYPE, NCNConfigForTransformers)
AutoModelForCausalLM.register(NCNConfigForTransformers, NCNForCausalLM)
