"""What is compared: the model, its static twin of equal parameter count, the model less its controller, and
transformers' GPT-2 of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import DEVICE
from ncn import ModulatedTransformer, NCNConfig
from ncn.config.recipe import Recipe
from ncn.core.signals.table import homeostatic_loss
from ncn.lab.arms import widened_baseline
from ncn.machine.memory import keep_freed_memory

CLIP = 1.0

OURS: dict[str, Callable[[NCNConfig], NCNConfig]] = {
    "ncn": lambda config: config,
    "static twin": widened_baseline,
    "no controller": lambda config: config.override(controller=None),
}
"""The configuration of each arm of ours, from that of the preset. What the static twin lacks in a controller it has in
the width of its feed-forward blocks."""


def our_model(preset: str, arm: str) -> ModulatedTransformer:
    """`arm` is one of `OURS`; signals are moved off neutral, so that no product is by one."""
    torch.manual_seed(0)
    model = ModulatedTransformer(OURS[arm](NCNConfig.preset(preset)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("controller."):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(DEVICE)


def gpt2(preset: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ours = NCNConfig.preset(preset)
    config = GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.context_length,
        n_embd=ours.d_model,
        n_layer=ours.num_layers,
        n_head=ours.num_heads,
        n_inner=ours.ffn_width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).to(DEVICE)


def batch(preset: str, sequences: int) -> tuple[Tensor, Tensor]:
    """Random inputs and the targets that follow them, filling the context."""
    config = NCNConfig.preset(preset)
    ids = torch.randint(config.vocab_size, (sequences, config.context_length + 1), device=DEVICE)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_step(
    arm: str, preset: str, data: tuple[Tensor, Tensor], precision: str, compiled: bool = False
) -> Callable[[], None]:
    """One optimiser step: forward, the recipe's pull of the signals to neutral, backward, clipping, fused AdamW.

    A step of ours keeps freed memory in the process, as `ncn train` does; transformers leaves that as it is.
    """
    inputs, targets = data
    model: nn.Module
    if arm == "gpt2":
        model = gpt2(preset)
        prepared = torch.compile(model) if compiled else model

        def loss() -> Tensor:
            result: Tensor = prepared(input_ids=inputs, labels=inputs, use_cache=False).loss
            return result

    else:
        keep_freed_memory()
        model = our_model(preset, arm)
        recipe = Recipe.preset(preset).train
        summed = torch.compile(model.loss) if compiled else model.loss

        def loss() -> Tensor:
            total, signals = summed(inputs, targets, chunk=recipe.loss_chunk)
            mean: Tensor = total / targets.numel()
            if signals and recipe.homeostatic_weight:
                mean = mean + recipe.homeostatic_weight * homeostatic_loss(signals)
            return mean

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_flops(preset: str, sequences: int) -> float:
    """Operations of the matrix products of a step: 6 for every weight and token, and causal attention."""
    config = NCNConfig.preset(preset).override(controller=None)
    with torch.device("meta"):
        model = ModulatedTransformer(config)
    looked_up = 0 if model.position_embedding is None else model.position_embedding.weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - looked_up
    tokens = sequences * config.context_length
    return 6 * weights * tokens + 6 * config.num_layers * config.d_model * config.context_length * tokens
