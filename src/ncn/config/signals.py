"""What there is to control, as far as it needs no torch."""

from __future__ import annotations

# What each signal says, for a reader who meets it for the first time.
MEANINGS = {
    "gain": "how strongly a layer writes to the residual stream",
    "precision": "how sharply it attends (an inverse temperature)",
    "ffn_gate": "how much of its feed-forward block it uses",
    "head_gate": "how much of an attention head it uses",
    "norm_film": "how strongly a sublayer sees a group of channels",
}
