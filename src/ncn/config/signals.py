"""The table of control signals (equation 4): what there is to control, in which range, and where neutral lies.

A new signal is a row of `SIGNALS`. Where it acts at a place that others act at already, that is all; a new place is a
row of `SITES`, and a line where the layers apply it, in `core/layers.py` or `core/model.py`, and in
`core/reference.py`. A new shape of range is a pair of functions in `core/signals/table.py`. None of this needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Site:
    """A place in a layer where signals act. Those that act at one place are multiplied, or added if it `adds`."""

    where: str
    parts: Literal["heads", "groups"] | None = None
    """Of what there may be several with a value each: attention heads, or groups of channels. None: of nothing."""
    adds: bool = False
    """Whether the signals are the share of something that is added, so that 0 changes nothing. Else they are factors,
    and 1 changes nothing."""


SITES: Mapping[str, Site] = {
    "residual": Site("residual stream before a layer: the share of the normalised embeddings added to it", adds=True),
    "attention_norm": Site("output of the RMSNorm before the attention", "groups"),
    "query": Site("queries, after RoPE and QK-norm", "heads"),
    "head": Site("each head's attention output, before the output projection", "heads"),
    "attention": Site("attention output, before the residual sum"),
    "ffn_norm": Site("output of the RMSNorm before the feed-forward block", "groups"),
    "ffn": Site("feed-forward output, before the residual sum"),
}
"""In the order of equation (5)."""


@dataclass(frozen=True)
class Range:
    """The values of a signal."""

    map: str
    """The function of the raw output z that gives them, by its name in `core/signals/table.py`."""
    low: float
    high: float
    start: float
    """The signal's value before training."""


@dataclass(frozen=True)
class SignalSpec:
    """One row of the table."""

    name: str
    symbol: str
    meaning: str
    """What it says, for a reader who meets it for the first time."""
    sites: tuple[str, ...]
    """Where it acts: names of `SITES` that all add, or all do not; with more than one value a layer, of equal parts."""
    per: str
    """What has a value of its own: the layer, each of its sites (`sublayer`), a head, or a group of channels of each of
    its sites; or the setting of the controller that says which of these."""
    smooth: Range
    published: Range | None = None

    @cached_property
    def parts(self) -> tuple[Literal["heads", "groups"] | None, ...]:
        """What there may be several of at each of its sites."""
        return tuple(SITES[site].parts for site in self.sites)

    @property
    def neutral(self) -> float:
        """The value that changes nothing."""
        return 0.0 if SITES[self.sites[0]].adds else 1.0


SIGMOID_3 = 1 / (1 + math.exp(-3))
"""σ(3), where the published feed-forward gate starts."""

_UP_TO_TWO = Range("2σ(z)", 0.0, 2.0, start=1.0)
_ROWS = (
    SignalSpec(
        "gain",
        "g",
        "how strongly a layer writes to the residual stream",
        sites=("attention", "ffn"),
        per="gain_per",
        smooth=_UP_TO_TWO,
        published=_UP_TO_TWO,
    ),
    SignalSpec(
        "precision",
        "β",
        "how sharply it attends (an inverse temperature)",
        sites=("query",),
        per="precision_per",
        smooth=Range("4^tanh z", 0.25, 4.0, start=1.0),
        published=Range("softplus(z) + 0.01, at most 4", 0.01, 4.0, start=1.0),
    ),
    SignalSpec(
        "ffn_gate",
        "γ",
        "how much of its feed-forward block it uses",
        sites=("ffn",),
        per="layer",
        smooth=Range("σ(z + 3) / σ(3)", 0.0, 1 / SIGMOID_3, start=1.0),
        published=Range("σ(z)", 0.0, 1.0, start=SIGMOID_3),
    ),
    SignalSpec(
        "head_gate",
        "η",
        "how much of an attention head it uses",
        sites=("head",),
        per="head",
        smooth=_UP_TO_TWO,
    ),
    SignalSpec(
        "norm_film",
        "ν",
        "how strongly a sublayer sees a group of channels",
        sites=("attention_norm", "ffn_norm"),
        per="group",
        smooth=_UP_TO_TWO,
    ),
    SignalSpec(
        "residual_mix",
        "μ",
        "how much of the embeddings enters a layer again",
        sites=("residual",),
        per="layer",
        smooth=Range("tanh z", -1.0, 1.0, start=0.0),
    ),
)
SIGNALS: Mapping[str, SignalSpec] = {row.name: row for row in _ROWS}


def meaning(name: str, otherwise: str = "") -> str:
    """What a signal says; `otherwise` for one that is not in the table, as a recorded scan may have."""
    return SIGNALS[name].meaning if name in SIGNALS else otherwise


def signals_at(site: str) -> tuple[str, ...]:
    """The signals that act at a site, in the table's order."""
    return tuple(name for name, row in SIGNALS.items() if site in row.sites)
