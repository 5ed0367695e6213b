"""Cross-entropy over a large vocabulary, a chunk of tokens at a time: a batch's logits never all exist at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ncn.config.training import IGNORED


def chunked_cross_entropy(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " positions"],
    chunk: int = 512,
    cap: float | None = None,
    shares: Float[Tensor, " positions"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over the positions that have a target of −log softmax(hidden · weightᵀ)[target], in nats; with a `cap`,
    of logits that level off there; with `shares`, of each position that many times.

    The gradients of a chunk are formed while its logits are at hand, so that nothing is computed twice and the peak is
    one chunk's logits: `chunk` × vocabulary numbers, in autocast's precision where that is on. What is summed or
    exponentiated is so in float32 or better.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, cap, shares)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        cap: float | None,
        shares: Tensor | None,
    ) -> Tensor:
        device = hidden.device.type
        exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(product), weight.to(product)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            hidden_grad = torch.empty_like(hidden) if need_hidden else None
            weight_grad = torch.zeros_like(weight) if need_weight else None
            # One chunk's memory serves them all: asking the system for new pages costs as much as a product.
            buffer = states.new_empty(min(chunk, len(states)), len(matrix))
            weight_part = None if weight_grad is None or product == weight_grad.dtype else torch.empty_like(matrix)
            for start in range(0, len(states), chunk):
                part = slice(start, start + chunk)
                state, target = states[part], targets[part]
                kept = (target != IGNORED)[:, None]
                if shares is not None:
                    kept = kept * shares[part, None].to(product)
                label = target.clamp(min=0)[:, None]
                logits = capped(torch.mm(state, matrix.T, out=buffer[: len(state)]), cap)
                slope = None if cap is None else 1 - (logits / cap).square()
                wanted = logits.gather(1, label).to(exact)
                highest, place = logits.max(-1, keepdim=True)
                softmax = torch.softmax(logits, -1, out=logits)
                log_total = highest.to(exact) - softmax.gather(1, place).to(exact).log()
                total += ((log_total - wanted) * kept).sum()
                # d loss / d logits = softmax − onehot(target), and nothing where there is no target
                gradient = softmax.scatter_(1, label, softmax.gather(1, label) - 1)
                if slope is not None:
                    gradient *= slope
                if hidden_grad is not None:
                    hidden_grad[part] = (gradient @ matrix) * kept
                if weight_grad is not None and weight_part is None:
                    weight_grad.addmm_(gradient.T, state * kept)
                elif weight_grad is not None:
                    weight_grad += torch.mm(gradient.T, state * kept, out=weight_part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        (scale,) = grad_outputs
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else weight_grad * scale,
            None,
            None,
            None,
            None,
        )


@torch.no_grad()
def token_losses(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " positions"],
    chunk: int = 512,
    cap: float | None = None,
) -> Float[Tensor, " positions"]:
    """−log softmax(hidden · weightᵀ)[target] at every position, in nats, in chunks; zero where there is no target.
    `cap` as in `chunked_cross_entropy`."""
    return torch.cat(
        [
            F.cross_entropy(
                _exact(capped(F.linear(states, weight), cap)), target, ignore_index=IGNORED, reduction="none"
            )
            for states, target in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
    )


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits themselves."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
