"""Recording a brain scan: run a model over a text and keep its signals and its surprise."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ncn.config.signals import SIGNALS
from ncn.core.interface import LanguageModel
from ncn.core.signals.table import range_map
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.scans.scan import Scan


@torch.inference_mode()
def scan(model: LanguageModel, tokenizer: Tokenizer, text: str, *, name: str = "") -> Scan:
    """The control signals at every token of `text`, and the surprisal of each token in bits.

    The text follows a separator, as every document does in training, so that its first token has a surprisal too; the
    separator itself is not shown. `name` is the model's, for the title. Raises `UserError` for an empty text, one that
    is longer than the context, and a model without a controller.
    """
    controller = model.core_config.controller
    if controller is None:
        raise UserError("this model has no controller, so there are no signals to scan: use a model that has one")
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the text is empty: there is nothing to scan")
    if len(ids) >= model.core_config.context_length:
        raise UserError(
            f"the text has {len(ids)} tokens (and a separator) and the model's context is "
            f"{model.core_config.context_length}; shorten it"
        )
    device = model.device
    sequence = torch.tensor([[tokenizer.separator_id, *ids]], device=device)
    output = model.read(sequence, output_signals=True)
    nats = F.cross_entropy(output.logits[0, :-1].float(), sequence[0, 1:], reduction="none")
    signals = {key: signal[0, 1:].double().cpu().numpy() for key, signal in (output.signals or {}).items()}
    return Scan(
        tokens=tokenizer.token_labels(ids),
        surprisal=[float(value) / math.log(2) for value in nats],
        signals=signals,
        neutral={key: SIGNALS[key].neutral for key in signals},
        bounds={key: (mapping.low, mapping.high) for key in signals if (mapping := range_map(key, controller.maps))},
        text=text,
        model=name,
    )
