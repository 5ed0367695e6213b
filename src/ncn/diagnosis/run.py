"""The whole diagnosis of one model on one corpus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ncn.core.interface import LanguageModel
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.events import reactivity
from ncn.diagnosis.examples import plot_twist, word_order
from ncn.diagnosis.freezing import causal_value, passes
from ncn.diagnosis.homeostasis import homeostasis, over_training
from ncn.diagnosis.readers import Reader, reader_of
from ncn.diagnosis.record import FEW_DOCUMENTS, Record, choose_texts, collect, seen_from_later
from ncn.diagnosis.stereotyping import across_tasks, from_first_sentence
from ncn.diagnosis.variance import explained_by_tokens, specialisation
from ncn.diagnosis.verdict import verdict
from ncn.errors import UserError
from ncn.machine.environment import describe_environment
from ncn.machine.progress import ProgressReport
from ncn.models.published import PublishedNCN
from ncn.scans.scan import Scan
from ncn.statistics.resampling import FEWEST, Resampling

DEFAULT_TOKENS = 32_768
NOT_CAUSAL = 1e-5  # of a signal's range, or nats: more than rounding


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All that was measured, and the record that it was measured on.

    Attributes:
        results: what `diagnosis.json` holds.
        record: the signals over the corpus.
        scan: the brain scan of the plot twist; None where there was no tokenizer to read it with.
    """

    results: dict[str, Any]
    record: Record
    scan: Scan | None

    @property
    def verdict(self) -> list[str]:
        """The verdict, sentence by sentence."""
        return list(self.results["verdict"]["sentences"])

    def save(self, folder: str | Path) -> list[Path]:
        """Write `diagnosis.json`, the page (Markdown and HTML) and its figures; returns the paths of page and JSON."""
        from ncn.diagnosis.page import write_diagnosis

        return write_diagnosis(self.results, self.scan, Path(folder))


def diagnose(
    model: LanguageModel | PublishedNCN | Reader,
    data: TokenDataset | Iterable[Sequence[int]],
    tokenizer: Tokenizer | None = None,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    batch_size: int = 16,
    metrics: Iterable[Mapping[str, Any]] = (),
    name: str = "",
    data_name: str = "",
    seed: int = 0,
    progress: bool = False,
) -> Diagnosis:
    """Measure what a model's control signals do over a corpus.

    Args:
        model: one with signals: our own, one of the published kind, or anything with the methods of `Reader`.
        data: a prepared dataset, or documents as lists of token ids.
        tokenizer: the model's; without it the measures that look at words are left out.
        max_tokens: about how many tokens of the corpus to read, evenly spread over its documents.
        batch_size: texts read at once.
        metrics: the records of the model's training run, for the signals' course over training.
        name, data_name: what to call the model and the corpus.
        seed: of the resampling.
        progress: whether to show how far it has come.

    Raises:
        UserError: the model has no controller, or there is too little text.
    """
    reader = reader_of(model)
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    texts = choose_texts(data, reader.context_length, max_tokens)
    total = sum(len(text.ids) for text in texts)
    done = 0
    with ProgressReport("reading", total * (1 + passes(len(reader.neutral))), progress) as bar:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(done, done)

        record = collect(reader, texts, batch_size=batch_size, advance=advance)
        resampling = Resampling(record.unit, seed)
        if resampling.units < FEWEST:
            raise UserError(
                f"there is too little text to diagnose: {resampling.units} texts, and an interval needs {FEWEST}; "
                "give more text or a larger max_tokens"
            )
        later = seen_from_later(reader, texts)
        causal = max(later.values()) < NOT_CAUSAL
        frozen = causal_value(reader, texts, record, resampling, batch_size=batch_size, advance=advance)
    explained = explained_by_tokens(record, resampling)
    loss = resampling.ratio(
        resampling.sums(np.nan_to_num(record.surprisal)), resampling.sums(np.isfinite(record.surprisal))
    )
    results: dict[str, Any] = {
        "format": 1,
        "model": name,
        "signals": list(record.signals),
        "source": reader.kind,
        "data": data_name,
        "tokens": total,
        "documents": record.documents,
        "resampled": "documents" if record.documents >= FEW_DOCUMENTS else "texts",
        "units": resampling.units,
        "seed": seed,
        "environment": describe_environment(torch.device("cpu")),
        "causality": {"causal": causal, "change_from_later_token": later},
        "loss": loss.as_dict(),
        "verdict": verdict(record, explained, frozen, causal=causal),
        "specialisation": {each: specialisation(record, each, resampling) for each in record.signals},
        "explained": explained,
        "reactivity": reactivity(record, tokenizer, resampling),
        "homeostasis": homeostasis(record, resampling),
        "training": over_training(metrics),
        "causal_value": frozen,
    }
    scan = None
    if tokenizer is not None:
        twist, scan = plot_twist(reader, record, tokenizer, name)
        results["stereotyping"] = {
            "first_sentence": from_first_sentence(record, tokenizer, resampling),
            "tasks": across_tasks(reader, record, tokenizer, resampling),
        }
        results["word_order"] = word_order(reader, record, tokenizer, resampling.random)
        results["plot_twist"] = twist
    return Diagnosis(_plain(results), record, scan)


def _plain(value: Any) -> Any:
    """The same with numbers that are none as None, so that it is JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
