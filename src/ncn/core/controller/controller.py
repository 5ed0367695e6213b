"""Where control signals come from: the controller (equations 2, 3, 7) and the two control arms it is compared with.

All three answer the same question, "which raw signals do the layers from tap m on get, given the hidden state that
enters layer m?", so the model does not know which of them it holds:

=============  =======================  ==================================================
kind           taps                     raw signals
=============  =======================  ==================================================
`Controller`   as configured, (0,)      salience-pooled context + local state, through a small network
`LocalGates`   every layer              a linear read-out of the layer's own input
`StaticGates`  (0,)                     learned constants
=============  =======================  ==================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.controller.inputs import ExternalInputs
from ncn.core.controller.phasic import convolve
from ncn.core.controller.salience import SalienceState, pool
from ncn.core.operations.linear import Linear, exact_dtype, linear_like
from ncn.core.operations.norm import RMSNorm, normed_linear
from ncn.core.signals.table import SignalLayout
from ncn.core.types import ControlInputs, Hidden, Segments

Raw = Float[Tensor, "batch tokens layers outputs"]
Context = Float[Tensor, "batch tokens pooled"]
"""c of equation (1): the text so far, pooled."""


class SignalSource(nn.Module, ABC):
    """Produces the raw signals z; `SignalLayout.split` maps them into their ranges."""

    taps: tuple[int, ...]

    @abstractmethod
    def forward(
        self,
        tap: int,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None = None,
        context: Context | None = None,
    ) -> tuple[Raw, Context | None]:
        """Raw signals for the layers that `tap` serves, from the hidden state that enters layer `tap`, from what is
        given from outside, and from the `context` that the tap before handed on; and what this one hands on. Only a
        `Controller` reads and hands on either."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise so that every signal starts exactly at its neutral value (equation 7).

        The model calls this last: a later model-wide initialisation would wipe the neutral start.
        """


class Controller(SignalSource):
    """The neuromodulatory controller: one small network for each tap."""

    def __init__(self, config: NCNConfig) -> None:
        super().__init__()
        assert config.controller is not None
        self.taps = config.controller.taps_in(config.num_layers)
        ends = (*self.taps[1:], config.num_layers)
        every = config.controller.pooling == "every"
        self.networks = nn.ModuleDict(
            {
                str(tap): ControllerNetwork(config, served=end - tap, name=f"tap{tap}", pools=every or tap == 0)
                for tap, end in zip(self.taps, ends, strict=True)
            }
        )

    def forward(
        self,
        tap: int,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None = None,
        context: Context | None = None,
    ) -> tuple[Raw, Context | None]:
        found: tuple[Raw, Context] = self.networks[str(tap)](hidden, segments, cache, control, context)
        return found

    def reset_parameters(self) -> None:
        for network in self.networks.values():
            assert isinstance(network, ControllerNetwork)
            network.reset_parameters()


class ControllerNetwork(nn.Module):
    """Equations (1) and (2) at one tap, for the `served` layers from there on; equation (1) if it `pools`."""

    def __init__(self, config: NCNConfig, served: int, name: str, pools: bool = True) -> None:
        super().__init__()
        controller = config.controller
        assert controller is not None
        self.name, self.served = name, served
        self.layout = SignalLayout.of(config)
        self.pools, self.width = controller.pooling_heads if pools else 0, controller.width
        self.kernel, self.context_length, self.eps = controller.phasic_kernel, config.context_length, config.norm_eps
        self.columns = [self.pools, self.width if pools else 0, self.width if controller.phasic else 0]
        # One matrix reads salience scores (the k of equation 1), values and the phasic input together.
        self.read = Linear(config.d_model, sum(self.columns), bias=False)
        self.log_decay = nn.Parameter(torch.empty(self.pools)) if pools else None
        self.phasic_filter = nn.Parameter(torch.empty(self.kernel, self.width)) if controller.phasic else None
        outputs = served * sum(self.layout.sizes)
        outside = controller.sliders_read or controller.tasks or controller.instructions
        self.external = ExternalInputs(config, outputs) if outside else None
        self.input_norm = RMSNorm(self.width, eps=config.norm_eps)
        self.expand = nn.Linear(self.width, controller.hidden)
        self.output = nn.Linear(controller.hidden, outputs)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.input_norm.weight)
        nn.init.normal_(self.read.weight, std=self.read.in_features**-0.5)
        # Salience starts nearly flat, and the heads' memories span the context, in equal ratios down to four tokens.
        nn.init.normal_(self.read.weight[: self.pools], std=0.02)
        if self.log_decay is not None:
            shares = torch.linspace(0, 1, self.pools) if self.pools > 1 else torch.zeros(1)
            longest, shortest = math.log(max(self.context_length, 4)), math.log(4)
            with torch.no_grad():
                self.log_decay.copy_(-(longest + (shortest - longest) * shares))
        if self.phasic_filter is not None:
            nn.init.normal_(self.phasic_filter, std=0.5 * self.kernel**-0.5)
            nn.init.ones_(self.phasic_filter[0])
        if self.external is not None:
            self.external.reset_parameters()
        nn.init.normal_(self.expand.weight, std=self.width**-0.5)
        nn.init.zeros_(self.expand.bias)
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            self.output.bias.copy_(self.layout.initial_bias().repeat(self.served))

    def forward(
        self,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None = None,
        context: Context | None = None,
    ) -> tuple[Raw, Context]:
        """See `SignalSource`. A network that does not pool takes the `context` of one that did."""
        device = "cpu" if hidden.is_meta else hidden.device.type
        # Exponentials and long sums do not survive bfloat16, and the controller is too small to gain from it: on CPU
        # a product of so few numbers even takes longer in it.
        arguments = hidden.to(exact_dtype(self.read.weight)), segments, cache, control, context
        if not torch.is_autocast_enabled(device):
            return self._forward(*arguments)
        with torch.autocast(device, enabled=False):
            return self._forward(*arguments)

    def _forward(
        self,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None,
        context: Context | None,
    ) -> tuple[Raw, Context]:
        read = normed_linear(hidden, self.read.weight.to(hidden.dtype), self.eps)
        scores, values, phasic = torch.split(read, self.columns, dim=-1)
        held = None if cache is None else cache.last(self.name, max(self.kernel - 1, 1))
        state = None
        if self.log_decay is not None:
            state = pool(
                scores / math.sqrt(hidden.shape[-1]),  # a of equation (1)
                values.reshape(*values.shape[:-1], self.pools, -1),
                self.log_decay.to(read.dtype).exp(),
                segments,
                self._past(held, cache),
            )
            context = state.mean.flatten(2)
        assert context is not None
        if cache is not None:
            cache.write(self.name, phasic if state is None else torch.cat([state.log_weight, context, phasic], -1))
        total = context  # c + φ + κ of equation (2)
        if self.phasic_filter is not None:
            past = None if held is None else held[..., -self.width :]
            past_segments = None if cache is None else cache.last("segments", max(self.kernel - 1, 1))
            total = total + convolve(phasic, self.phasic_filter, segments, past, past_segments)
        if self.external is not None and control is not None and (given := self.external(control)) is not None:
            total = total + given.to(total.dtype)
        raw = linear_like(torch.tanh(linear_like(self.input_norm(total), self.expand)), self.output)
        if self.external is not None and control is not None:
            straight = self.external.straight_to_signals(control)
            raw = raw if straight is None else raw + straight
        return torch.unflatten(raw, -1, (self.served, -1)), context

    def _past(self, held: Tensor | None, cache: Cache | None) -> SalienceState | None:
        """The salience state after the last token held."""
        if held is None or cache is None:
            return None
        log_weight, mean, _ = torch.split(held[:, -1:], self.columns, dim=-1)
        return SalienceState(log_weight, torch.unflatten(mean, -1, (self.pools, -1)), cache.last("segments", 1))


class LocalGates(SignalSource):
    """Control arm: every layer reads its own signals from its own input, with one linear map."""

    def __init__(self, config: NCNConfig) -> None:
        super().__init__()
        self.layout = SignalLayout.of(config)
        self.taps = tuple(range(config.num_layers))
        self.eps = config.norm_eps
        self.readouts = nn.ModuleList(
            nn.Linear(config.d_model, sum(self.layout.sizes)) for _ in range(config.num_layers)
        )

    def forward(
        self,
        tap: int,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None = None,
        context: Context | None = None,
    ) -> tuple[Raw, None]:
        readout = self.readouts[tap]
        assert isinstance(readout, nn.Linear)
        # in float32, like the controller that it is compared with
        with torch.autocast("cpu" if hidden.is_meta else hidden.device.type, enabled=False):
            normed = F.rms_norm(hidden.to(exact_dtype(readout.weight)), hidden.shape[-1:], eps=self.eps)
            raw = linear_like(normed, readout)
        return raw.unsqueeze(2), None

    def reset_parameters(self) -> None:
        for readout in self.readouts:
            assert isinstance(readout, nn.Linear)
            nn.init.zeros_(readout.weight)
            with torch.no_grad():
                readout.bias.copy_(self.layout.initial_bias())


class StaticGates(SignalSource):
    """Control arm: learned constants, the same for every token."""

    def __init__(self, config: NCNConfig) -> None:
        super().__init__()
        self.layout = SignalLayout.of(config)
        self.taps = (0,)
        self.raw = nn.Parameter(torch.empty(config.num_layers, sum(self.layout.sizes)))

    def forward(
        self,
        tap: int,
        hidden: Hidden,
        segments: Segments | None,
        cache: Cache | None,
        control: ControlInputs | None = None,
        context: Context | None = None,
    ) -> tuple[Raw, None]:
        return self.raw.expand(*hidden.shape[:2], -1, -1), None

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.raw.copy_(self.layout.initial_bias())


def signal_source(config: NCNConfig) -> SignalSource | None:
    """The source that the configuration asks for; None for the static baseline."""
    if config.controller is None:
        return None
    kinds: dict[str, type[Controller] | type[LocalGates] | type[StaticGates]] = {
        "ncn": Controller,
        "local": LocalGates,
        "static": StaticGates,
    }
    return kinds[config.controller.kind](config)
