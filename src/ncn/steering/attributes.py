"""Attributes of documents as sliders: measured on the text or taken from the user's columns, and ranked among all
documents of a dataset.

A slider at 0.9 means "more than in nine documents of ten". A dataset folder holds, beside its tokens,
`attributes.safetensors` (the rank of every document for every attribute, and how often each token occurs) and
`attributes.json` (the names and the distributions), with which other text is ranked in the same way.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from ncn.data.dataset import TokenDataset
from ncn.data.document_columns import read_numbers
from ncn.errors import UserError
from ncn.machine.files import write_atomically
from ncn.machine.progress import ProgressReport

VALUES, TABLE = "attributes.safetensors", "attributes.json"
QUANTILES = 1001
_TOKEN_COUNTS = "token_counts"
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’]*(?:\s|$)")
_QUOTED = re.compile(r"“[^”]*”|\"[^\"]*\"")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

Array = npt.NDArray[np.float64]


def _words(text: str) -> int:
    return len(_WORD.findall(text))


def _sentences(text: str) -> int:
    return max(len(_SENTENCE_END.findall(text)), 1)


MEASURES: Mapping[str, Callable[[str], float]] = {
    "dialogue": lambda text: sum(map(len, _QUOTED.findall(text))) / max(len(text), 1),
    "sentence_length": lambda text: _words(text) / _sentences(text),
    "length": _words,
    "exclamations": lambda text: text.count("!") / _sentences(text),
    "questions": lambda text: text.count("?") / _sentences(text),
}
"""What is measured on the text: the share of characters inside quotation marks, words a sentence, words, exclamation
marks and question marks a sentence. `rarity`, the mean of −log₂ of each token's frequency, and, where the package
vaderSentiment is installed, `sentiment`, from −1 to 1, come with them."""


MEASURED = (*MEASURES, "rarity", "sentiment")
"""The names of all that `measure` may return."""


def measure(text: str, tokens: npt.NDArray[np.int64], counts: Array) -> dict[str, float]:
    """The attributes of one document. `counts` (vocabulary,) is how often each token occurs in the reference data."""
    found = {name: float(function(text)) for name, function in MEASURES.items()}
    frequency = (counts[tokens] + 1) / (counts.sum() + len(counts))
    found["rarity"] = float(-np.log2(frequency).mean()) if len(tokens) else 0.0
    if (analyser := _sentiment()) is not None:
        found["sentiment"] = float(analyser.polarity_scores(text)["compound"])
    return found


def rank(values: Array, quantiles: Array) -> Array:
    """Where `values` lie in a distribution, from 0 to 1, ties in the middle, NaN where there is none; `quantiles` are
    sorted."""
    below = np.searchsorted(quantiles, values, side="left") + np.searchsorted(quantiles, values, side="right")
    ranks: Array = np.where(np.isnan(values), np.nan, below / (2 * len(quantiles)))
    return ranks


def write_attributes(
    folder: str | Path, reference: str | Path | None = None, *, measured: bool = True, progress: bool = False
) -> list[str]:
    """Rank every document of the dataset in `folder`, and write the ranks there; returns the attributes' names.

    Ranks are those among the documents of `reference`, another dataset folder with attributes and the same tokenizer,
    or among its own; of what is `measured` on the text, and of the columns of numbers that the data was prepared with.
    Raises `UserError` for a reference without attributes or without one of the columns, and where nothing is to rank.
    """
    dataset = TokenDataset.open(folder)
    table = read_table(reference) if reference is not None else None
    columns = read_numbers(dataset)
    check_columns(columns)
    for name in columns:
        if table is not None and name not in table:
            raise UserError(f"{reference} has no attribute {name!r} to rank by: prepare it with --slider {name} too")
    if table is None:
        counts = np.zeros(dataset.vocab_size)
        for start in range(0, dataset.tokens, 1 << 20):
            size = min(1 << 20, dataset.tokens - start)
            counts += np.bincount(dataset.read(start, size), minlength=dataset.vocab_size)
    else:
        assert reference is not None
        counts = load_file(Path(reference) / VALUES)[_TOKEN_COUNTS]
    values = (_measured(dataset, counts, progress) if measured else {}) | columns
    names = [name for name in (values if table is None else table) if name in values]
    if not names:
        known = f"; {reference} has {', '.join(table)}" if table else ""
        raise UserError(f"there is nothing to rank in {folder}: prepare it with --attributes or --slider COLUMN{known}")
    shares = np.linspace(0, 1, QUANTILES)
    quantiles = table or {name: np.nanquantile(values[name], shares).tolist() for name in names}
    ranks = np.stack([rank(values[name], np.array(quantiles[name])) for name in names], 1).astype(np.float32)
    write_atomically(Path(folder) / VALUES, save({"ranks": ranks, _TOKEN_COUNTS: counts}))
    content = {"attributes": {name: quantiles[name] for name in names}, "data": dataset.fingerprint}
    write_atomically(Path(folder) / TABLE, json.dumps(content) + "\n")
    return names


def check_columns(names: Iterable[str]) -> None:
    """Raises `UserError` for a column that is called as what is measured on the text."""
    for name in names:
        if name in MEASURED:
            raise UserError(f"a column cannot be called {name!r}, as what --attributes measures: rename it")


def _measured(dataset: TokenDataset, counts: Array, progress: bool) -> dict[str, Array]:
    """What is measured on each document, by name."""
    decode = dataset.tokenizer().decode
    rows: list[dict[str, float]] = []
    with ProgressReport("measure", dataset.tokens, progress) as bar:
        for start, end in dataset.document_bounds():
            tokens = dataset.read(start + 1, end - start - 1)
            rows.append(measure(decode(tokens.tolist()), tokens, counts))
            bar.update(end, end)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def read_table(folder: str | Path) -> dict[str, list[float]]:
    """The quantiles of each attribute in a dataset folder, by name."""
    return dict(_read(Path(folder))["attributes"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / TABLE).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no attributes: prepare it with --attributes, or --slider COLUMN") from None
    except ValueError:
        raise UserError(f"{folder / TABLE} cannot be read: prepare the data with --attributes again") from None
    return content


class DocumentSliders:
    """The sliders of a dataset's documents, `ranks` (documents, sliders); `starts` says where each document begins."""

    def __init__(self, dataset: TokenDataset, names: tuple[str, ...]) -> None:
        """Raises `UserError` where the dataset has no such attribute."""
        content = _read(dataset.folder)
        known = list(content["attributes"])
        for name in names:
            if name not in known:
                remedy = "; to measure it, pip install vaderSentiment and prepare the data with --attributes again"
                raise UserError(
                    f"{dataset.folder} has no attribute {name!r}; it has {', '.join(known)}"
                    + (remedy if name == "sentiment" and _sentiment() is None else "")
                )
        if content["data"] != dataset.fingerprint:
            raise UserError(f"the attributes in {dataset.folder} are of other data: prepare it with --attributes again")
        self.all_names, self.all_ranks = known, load_file(dataset.folder / VALUES)["ranks"]
        self.ranks = self.all_ranks[:, [known.index(name) for name in names]]
        self.starts = dataset.document_starts()


@functools.cache
def _sentiment() -> Any:
    """The analyser of vaderSentiment, or None where the package is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return None
    return SentimentIntensityAnalyzer()
