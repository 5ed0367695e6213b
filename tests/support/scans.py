"""Scans made of random signals, for the tests of what keeps and draws them."""

import numpy as np

from ncn.scans.scan import Scan


def make_scan(tokens: list[str], *, layers: int = 2, heads: int = 2, strength: float = 1.0, seed: int = 0) -> Scan:
    """A scan with a gain per layer, a precision per head, and an FFN gate, which move in proportion to `strength`."""
    random = np.random.default_rng(seed)
    count = len(tokens)
    return Scan(
        tokens=list(tokens),
        surprisal=[float(bits) for bits in random.gamma(1.5, 2.2, count)],
        signals={
            "gain": 1 + strength * np.tanh(random.normal(0, 0.5, (count, layers))),
            "precision": 4 ** np.tanh(strength * random.normal(0, 0.5, (count, layers, heads))),
            "ffn_gate": 1 - 0.5 * strength * random.random((count, layers)),
        },
        neutral={"gain": 1.0, "precision": 1.0, "ffn_gate": 1.0},
        bounds={"gain": (0.0, 2.0), "precision": (0.25, 4.0), "ffn_gate": (0.0, 1.05)},
        text="".join(tokens),
        model="test model",
    )
