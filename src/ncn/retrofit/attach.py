"""Attaching a controller to a transformers model, and all that the handle can do.

The signals of a forward pass travel in a `Carrier`, as a keyword argument, through the decoder into every layer and its
attention. So a layer that gradient checkpointing computes a second time, perhaps after other forward passes, meets the
signals of its own. The sites further inside get no keyword arguments; the attention module, which does and runs before
them, leaves its layer's factors where they find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ncn.config.model import ControllerConfig
from ncn.config.signals import SIGNALS
from ncn.core.cache import Cache
from ncn.core.controller.controller import SignalSource, signal_source
from ncn.core.segments import find_segments
from ncn.core.signals.modulation import Factors, layer_factors, scale
from ncn.core.signals.table import Frozen, SignalLayout, freeze, homeostatic_loss
from ncn.core.types import ControlInputs
from ncn.errors import UserError
from ncn.hf.cache import state_of
from ncn.retrofit.attention import CARRIER, use_sharpened_attention
from ncn.retrofit.families import BASE_SITES, Family, core_config, family_of, find_sites
from ncn.retrofit.files import save_controller
from ncn.retrofit.guidance import use_guidance
from ncn.retrofit.inputs import InputsAt, Instruction, inputs_at, stretch
from ncn.retrofit.masks import real_tokens
from ncn.retrofit.probe import check_sites
from ncn.steering.values import SliderValues, TaskValues

NAME = "ncn_controller"
"""What the controller is called among the model's modules while it is attached."""


@dataclass(eq=False)
class Carrier:
    """What one forward pass hands from hook to hook."""

    mask: Any
    cache: Cache | None
    inputs: ControlInputs | None = None
    segments: Tensor | None = None
    context: Tensor | None = None
    """What the taps so far have pooled of the text."""
    tokens: int = 0
    factors: dict[int, Factors] = field(default_factory=dict)
    signals: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By the tap that they come from, each for the layers it serves."""


def attach(
    model: nn.Module,
    config: ControllerConfig | None = None,
    *,
    family: Family | None = None,
    freeze_base: bool = True,
) -> AttachedController:
    """Put a new controller on a decoder of the Hugging Face library. Until it is trained the model computes what it
    computed before, bit for bit.

    Args:
        model: a causal language model of one of the architectures in `ncn.retrofit.FAMILIES`, or a PEFT model of one.
        config: the controller; by default that of `ControllerConfig()`.
        family: where the sites of another architecture are.
        freeze_base: whether the model's own parameters stop requiring gradients until `detach`.

    Raises:
        UserError: a controller is attached already, the architecture is unknown, a site is missing, or a site has no
            effect on the model's output.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):  # PEFT
        base = base.get_base_model()
    if hasattr(base, NAME):
        raise UserError("this model has a controller already; call detach() on its handle first")
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"attach needs a transformers model, not {type(base).__name__}")
    for name in config.signals if config is not None else ():
        if not set(SIGNALS[name].sites) <= set(BASE_SITES):
            raise UserError(f"{name} has no site on a base; leave it out of controller.signals")
    if config is not None and config.sliders_enter != "controller":
        raise UserError("on a base sliders can only enter the controller; leave out controller.sliders_enter")
    return AttachedController(base, config or ControllerConfig(), family or family_of(base), freeze_base)


class AttachedController:
    """The handle of a controller on a model."""

    def __init__(self, model: PreTrainedModel, config: ControllerConfig, family: Family, freeze_base: bool) -> None:
        self.model, self.config = model, config
        self.decoder, self.sites = find_sites(model, family)
        self.core_config = core_config(self.decoder.config, config, len(self.sites))
        self.layout = SignalLayout.of(self.core_config)
        controller = signal_source(self.core_config)
        assert controller is not None
        self.controller: SignalSource = controller
        self.controller.reset_parameters()
        self.controller.to(next(self.decoder.parameters()).device)
        self._enabled = True
        self._frozen: Frozen = {}
        self._inputs: InputsAt | None = None
        self.probe: dict[int, Factors] | None = None
        """While the sites are checked: the factors that take the signals' place."""
        self.current: dict[int, Factors | None] = {}
        self._last: dict[str, Tensor] = {}
        self._last_mask: Tensor | None = None
        self._undo: list[Callable[[], object]] = [use_sharpened_attention(self.decoder)]
        try:
            self._add_hooks()
            check_sites(model, self.decoder, self.core_config, self._probed)
        except BaseException:
            self._undo_all()
            raise
        self._enter_model(freeze_base)

    # What the user has in hand

    @property
    def signals(self) -> dict[str, Tensor]:
        """The signals of the last forward pass, (batch, tokens, layers[, sites]) by name; with their graph, if that
        pass had one. Raises `UserError` before the first pass."""
        if not self._last:
            raise UserError("there are no signals yet: run the model first, with its controller enabled")
        return self._last

    def homeostatic_loss(self) -> Tensor:
        """Equation (6) without λ, for the last forward pass: a scalar."""
        return homeostatic_loss(self.signals)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The controller's parameters."""
        return self.controller.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The controller's parameters with their names in the saved file."""
        return self.controller.named_parameters()

    def num_parameters(self) -> int:
        """How many numbers the controller has."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The model without its controller, inside a `with` block."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @contextmanager
    def frozen_at(self, value: Literal["neutral", "mean"] | Frozen) -> Iterator[None]:
        """Signals held still inside a `with` block.

        Args:
            value: "neutral", where no signal has any effect; "mean", the mean of every layer and head over the real
                tokens of the last forward pass; or tensors by name, for the signals to hold, which broadcast to
                (batch, tokens, layers[, sites]).
        """
        before = self._frozen
        self._frozen = self.still(value) if isinstance(value, str) else value
        try:
            yield
        finally:
            self._frozen = before

    @contextmanager
    def given(
        self,
        *,
        sliders: SliderValues | None = None,
        task: TaskValues = None,
        instruction: Instruction | None = None,
        tokenizer: Any = None,
    ) -> Iterator[None]:
        """Inputs from outside for what runs inside a `with` block: forward passes, and `generate`.

        Args:
            sliders: `{"calm": 0.8}`; a list has a value for each row of the batch, and a tensor (rows, places) moves
                along the sequence. Or a tensor (rows, sliders). None and NaN are unset.
            task: a name, or one for each row.
            instruction: in words, or as token ids; or one for each row.
            tokenizer: the base's, which an instruction in words needs.

        Raises:
            UserError: for what the controller does not have, and for values that are out of range.
        """
        with self.fed_by(inputs_at(self.model, self.core_config, sliders, task, instruction, tokenizer)):
            yield

    @contextmanager
    def fed_by(self, inputs: InputsAt) -> Iterator[None]:
        """As `given`, with a function that says what is given."""
        before, self._inputs = self._inputs, inputs
        try:
            yield
        finally:
            self._inputs = before

    def still(self, value: str) -> dict[str, Tensor]:
        """The tensors (1, 1, layers[, sites]) that `frozen_at` holds the signals at."""
        if value == "mean":
            signals = {name: signal.detach() for name, signal in self.signals.items()}
            if self._last_mask is None:
                return {name: signal.mean((0, 1), keepdim=True) for name, signal in signals.items()}
            return {name: signal[self._last_mask].mean(0)[None, None] for name, signal in signals.items()}
        if value == "neutral":
            shapes = zip(self.layout.names, self.layout.shapes, strict=True)
            device = next(self.parameters()).device
            return {
                name: torch.full((1, 1, len(self.sites), *shape), SIGNALS[name].neutral, device=device)
                for name, shape in shapes
            }
        raise UserError(f"signals can be frozen at 'neutral' or 'mean', not at {value!r}")

    def save(self, folder: str | Path, *, base_name: str | None = None) -> None:
        """Write `controller.safetensors` and `controller.json` to `folder`; see `ncn.load_controller`.

        `base_name`, the base's folder or hub name, lets `ncn.load` and the command line find the base by themselves.
        """
        save_controller(self.controller, self.config, self.model, Path(folder), base_name)

    def detach(self) -> None:
        """Take the controller off. The model is as it was before `attach`; the handle's parameters remain."""
        if getattr(self.model, NAME, None) is not self.controller:
            raise UserError("this controller is not attached any more")
        self._undo_all()
        self.current, self._last, self._last_mask = {}, {}, None

    # How it gets there

    @contextmanager
    def _probed(self, factors: dict[int, Factors]) -> Iterator[None]:
        """These factors in the signals' place, inside a `with` block."""
        self.probe = factors
        try:
            yield
        finally:
            self.probe = None
            self.current = {}

    def _enter_model(self, freeze_base: bool) -> None:
        """Among the model's modules, where `to`, `train` and optimizers find it."""
        if freeze_base:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._undo.append(lambda parameter=parameter: parameter.requires_grad_(True))  # type: ignore[misc]
        generation: Any = self.model.generation_config
        if generation is not None:
            # The controller's state grows by a slot at each token: a compiled step would be compiled anew each time.
            before, generation.disable_compile = generation.disable_compile, True
            self._undo.append(lambda: setattr(generation, "disable_compile", before))
            guided = use_guidance(self.model, lambda: self._enabled and self._inputs is not None, self.given)
            self._undo.append(guided)
        self.controller.train(self.model.training)
        self.model.add_module(NAME, self.controller)
        self._undo.append(lambda: delattr(self.model, NAME))

    def _undo_all(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _add_hooks(self) -> None:
        add = self._undo.append
        add(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        add(self.decoder.register_forward_hook(self._end, with_kwargs=True).remove)
        for index, sites in enumerate(self.sites):
            add(sites.layer.register_forward_pre_hook(self._tap(index), with_kwargs=True).remove)
            add(sites.attention.register_forward_pre_hook(self._unpack(index), with_kwargs=True).remove)
            add(sites.projection.register_forward_pre_hook(self._gate_heads(index)).remove)
            add(sites.attention_output.register_forward_hook(self._scale_output(index, "attention")).remove)
            add(sites.ffn_output.register_forward_hook(self._scale_output(index, "ffn")).remove)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._enabled:
            return None
        kwargs = dict(kwargs)
        config: Any = module.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and kwargs.get("past_key_values") is None and not module.training:
            kwargs["past_key_values"] = DynamicCache(config=config)  # as the decoder does, but here it gets our state
        host = kwargs.get("past_key_values") if use_cache else None
        self._refuse_reentrant(module)
        mask = kwargs.get("attention_mask")
        cache = None if host is None or module.training else state_of(host)
        inputs = None if self._inputs is None else self._inputs(*stretch(args, kwargs, cache))
        kwargs[CARRIER] = Carrier(mask, cache, inputs)
        return args, kwargs

    def _refuse_reentrant(self, decoder: nn.Module) -> None:
        layer: Any = self.sites[0].layer
        if decoder.training and getattr(layer, "gradient_checkpointing", False):
            keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
            if keywords.get("use_reentrant", True):
                raise UserError(
                    "reentrant gradient checkpointing returns no gradients to the controller; enable it with "
                    '{"use_reentrant": False}'
                )

    def _tap(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            carrier: Carrier | None = kwargs.get(CARRIER)
            if carrier is None:
                return
            if self.probe is not None:
                carrier.factors = self.probe
                return
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                self._find_segments(carrier, hidden)
            if index in self.controller.taps:
                self._control(carrier, index, hidden)

        return hook

    def _find_segments(self, carrier: Carrier, hidden: Tensor) -> None:
        carrier.tokens = hidden.shape[1]
        start = 0 if carrier.cache is None else carrier.cache.length
        if carrier.cache is not None:
            carrier.cache.check_batch(hidden.shape[0])
        mask = real_tokens(carrier.mask, carrier.tokens, start)
        carrier.segments = find_segments(self.core_config, hidden, None, mask, carrier.cache)

    def _control(self, carrier: Carrier, tap: int, hidden: Tensor) -> None:
        raw, carrier.context = self.controller(
            tap, hidden, carrier.segments, carrier.cache, carrier.inputs, carrier.context
        )
        signals = self.layout.split(raw)
        if self._frozen:
            signals = {name: freeze(name, signal, self._frozen, tap) for name, signal in signals.items()}
        carrier.signals[tap] = signals
        # the projection may have a bias or be followed by a norm, so that gain cannot ride on the heads
        for offset, factors in enumerate(layer_factors(signals, gain_on_heads=False)):
            carrier.factors[tap + offset] = factors

    def _unpack(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            carrier: Carrier | None = kwargs.get(CARRIER)
            self.current[index] = None if carrier is None else carrier.factors[index]

        return hook

    def _gate_heads(self, index: int) -> Callable[..., Any]:
        heads = self.core_config.num_heads

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            factors = self.current.get(index)
            if factors is None or factors.head is None:
                return None
            outputs = torch.unflatten(args[0], -1, (heads, -1))
            if self.probe is not None and outputs.shape != factors.head.shape:
                raise UserError(
                    f"the projection that the Family names reads {args[0].shape[-1]} numbers, which are not "
                    f"{heads} heads of {factors.head.shape[-1]}; name the module that joins the heads"
                )
            return (scale(outputs, factors.head).flatten(-2), *args[1:])

        return hook

    def _scale_output(self, index: int, site: Literal["attention", "ffn"]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            factors = self.current.get(index)
            if site == "ffn":  # the last site of a layer
                self.current[index] = None
            factor = None if factors is None else getattr(factors, site)
            if factor is None:
                return None
            if isinstance(output, tuple):
                return (scale(output[0], factor), *output[1:])
            return scale(output, factor)

        return hook

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        carrier: Carrier | None = kwargs.get(CARRIER)
        if carrier is None or self.probe is not None:
            return
        parts = [carrier.signals[tap] for tap in sorted(carrier.signals)]
        self._last = (
            parts[0]
            if len(parts) == 1
            else {name: torch.cat([part[name] for part in parts], 2) for name in self.layout.names}
        )
        self._last_mask = None if carrier.segments is None else carrier.segments > 0
        if carrier.cache is not None:
            carrier.cache.advance(carrier.tokens)
