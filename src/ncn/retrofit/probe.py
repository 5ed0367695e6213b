"""Does every site of a base matter? One small forward and backward pass, when a controller is attached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ncn.config.model import NCNConfig
from ncn.config.signals import SITES, signals_at
from ncn.core.signals.modulation import Factors
from ncn.errors import UserError
from ncn.retrofit.families import BASE_SITES

CANCELS = 1e-4
"""A sum that is smaller than this share of its terms' sizes is taken for zero."""


def check_sites(
    model: PreTrainedModel,
    decoder: nn.Module,
    shape: NCNConfig,
    probed: Callable[[dict[int, Factors]], AbstractContextManager[None]],
) -> None:
    """One small forward and backward pass: is every site of every layer on the way to the output, and does its
    scale matter there? `probed` puts factors in the signals' place, by layer, inside a `with` block.

    The probe has a factor for every number. Where a norm follows that removes any scale, their gradients within a
    row are not zero, but they cancel.
    """
    tokens, heads = 4, shape.num_heads
    config: Any = decoder.config
    width, device = config.hidden_size, next(decoder.parameters()).device
    per_head = (1, tokens, heads, getattr(config, "head_dim", None) or width // heads)
    sizes = {site: per_head if SITES[site].parts == "heads" else (1, tokens, width) for site in BASE_SITES}
    probe = {
        index: Factors(**{site: torch.ones(size, device=device).requires_grad_() for site, size in sizes.items()})
        for index in range(shape.num_layers)
    }
    leaves = [getattr(factors, site) for factors in probe.values() for site in BASE_SITES]
    with probed(probe):
        grads = iter(_gradients(model, shape.vocab_size, leaves, tokens))
    exact = next(decoder.parameters()).dtype in (torch.float32, torch.float64)
    for index in probe:
        for site in BASE_SITES:
            grad, signals = next(grads), " and ".join(signals_at(site))
            size = torch.zeros(1) if grad is None else grad.abs().sum(-1)
            if grad is None or not size.max() > 0:
                raise UserError(
                    f"{signals} has no effect on layer {index}: its {site} site, as the Family names it, is not on "
                    "the way to the output"
                )
            left = (grad.sum(-1).abs() / size).nan_to_num().max().item()
            if exact and left < CANCELS:
                raise UserError(
                    f"{signals} has no effect on layer {index}: a norm behind its {site} site, as the Family names "
                    "it, undoes any scale; name the last module before the residual sum"
                )


def _gradients(model: PreTrainedModel, vocab_size: int, leaves: list[Tensor], tokens: int) -> tuple[Tensor | None, ...]:
    """Of a random function of the output, by the leaves."""
    training = {module: module.training for module in model.modules()}
    model.eval()  # type: ignore[no-untyped-call]
    device = leaves[0].device
    ids = torch.arange(1, tokens + 1, device=device)[None] % vocab_size
    try:
        with torch.enable_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(device)
            return torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(f"the model does not run with the sites that the Family names: {problem}") from None
    finally:
        for module, flag in training.items():
            module.training = flag
