"""Does every site of a base matter? One small forward and backward pass, when a controller is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncn.errors import UserError
from ncn.modulation import Factors

if TYPE_CHECKING:
    from ncn.retrofit.attach import AttachedController

CANCELS = 1e-4
"""A sum that is smaller than this share of its terms' sizes is taken for zero."""


def check_sites(handle: AttachedController) -> None:
    """One small forward and backward pass: is every site of every layer on the way to the output, and does its
    scale matter there?

    The probe has a factor for every number. Where a norm follows that removes any scale, their gradients within a
    row are not zero, but they cancel.
    """
    tokens, heads = 4, handle.core_config.num_heads
    config: Any = handle.decoder.config
    width, device = config.hidden_size, next(handle.decoder.parameters()).device
    per_head = (1, tokens, heads, getattr(config, "head_dim", None) or width // heads)
    sites = {
        "query": ("precision", per_head),
        "head": ("head_gate", per_head),
        "attention": ("gain", (1, tokens, width)),
        "ffn": ("gain and ffn_gate", (1, tokens, width)),
    }
    probe = {
        index: Factors(
            **{site: torch.ones(shape, device=device).requires_grad_() for site, (_, shape) in sites.items()}
        )
        for index in range(len(handle.sites))
    }
    leaves = [getattr(factors, site) for factors in probe.values() for site in sites]
    grads = iter(_gradients(handle, probe, leaves, tokens))
    exact = next(handle.decoder.parameters()).dtype in (torch.float32, torch.float64)
    for index in probe:
        for site, (signal, _) in sites.items():
            grad = next(grads)
            size = torch.zeros(1) if grad is None else grad.abs().sum(-1)
            if grad is None or not size.max() > 0:
                raise UserError(
                    f"{signal} has no effect on layer {index}: its {site} site, as the Family names it, is not on "
                    "the way to the output"
                )
            left = (grad.sum(-1).abs() / size).nan_to_num().max().item()
            if exact and left < CANCELS:
                raise UserError(
                    f"{signal} has no effect on layer {index}: a norm behind its {site} site, as the Family names "
                    "it, undoes any scale; name the last module before the residual sum"
                )


def _gradients(
    handle: AttachedController, probe: dict[int, Factors], leaves: list[Tensor], tokens: int
) -> tuple[Tensor | None, ...]:
    """Of a random function of the output, by the factors of the probe."""
    training = {module: module.training for module in handle.model.modules()}
    handle.model.eval()  # type: ignore[no-untyped-call]
    handle.probe = probe
    device = leaves[0].device
    ids = torch.arange(1, tokens + 1, device=device)[None] % handle.core_config.vocab_size
    try:
        with torch.enable_grad():
            logits: Tensor = handle.model(input_ids=ids, use_cache=False).logits.float()
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(device)
            return torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(f"the model does not run with the sites that the Family names: {problem}") from None
    finally:
        handle.probe = None
        handle.current = {}
        for module, flag in training.items():
            module.training = flag
