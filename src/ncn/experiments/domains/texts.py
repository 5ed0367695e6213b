"""The texts of a comparison on two domains, cut from data whose documents belong to two tasks.

    OUT/data/first, second/     the training text of each domain: equally many tokens
    OUT/data/both/              the same texts, one after the other; batches draw their windows from all of it
    OUT/data/tuning/            documents from the end of each domain's training text, for choosing learning rates
    OUT/data/validation/        documents of the validation data, spread over each domain, for the results

In each of the last three both domains have equally many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ncn.data.dataset import TokenDataset, check_same_tokenizer
from ncn.data.subsets import Place, subset
from ncn.errors import UserError
from ncn.lab.texts import Splits

TUNING_SHARE = 0.05
"""Of each domain's documents, the last, are kept for tuning."""
MOST_OF_A_DOCUMENT = 8
"""No document makes up more than an eighth of a domain's validation text, or than its share where there are fewer."""


@dataclass(frozen=True)
class DomainData:
    """Dataset folders, opened; `names` are the two domains, in the order of training."""

    names: tuple[str, str]
    first: TokenDataset
    second: TokenDataset
    splits: Splits


def make_domain_data(folder: Path, data: str | Path, valid: str | Path, *, measured_tokens: int) -> DomainData:
    """Cut the texts out of two dataset folders made by `ncn prepare --task A --task B`; done once, and checked after.

    Args:
        folder: where to put them.
        data, valid: dataset folders with the same tokenizer and the same two tasks.
        measured_tokens: tokens of each domain in the tuning and in the validation text, at most.

    Raises:
        UserError: data without exactly two tasks, too little of it, or other data than `folder` was made from.
    """
    whole, held_out = TokenDataset.open(data), TokenDataset.open(valid)
    check_same_tokenizer(whole, held_out)
    if len(whole.tasks) != 2:
        raise UserError(
            f"two domains are compared, and the documents in {data} belong to {len(whole.tasks)} tasks: prepare two "
            "sources with --task FIRST --task SECOND"
        )
    if set(held_out.tasks) != set(whole.tasks):
        raise UserError(
            f"the documents in {valid} must belong to the tasks {' and '.join(whole.tasks)}, as those in {data} do; "
            f"they belong to {', '.join(held_out.tasks) or 'none'}"
        )
    training, tuning = [], []
    for name in whole.tasks:
        documents = documents_of(whole, name)
        kept = max(1, round(len(documents) * TUNING_SHARE))
        if kept == len(documents):
            raise UserError(f"{name} has {len(documents)} document in {data}: at least two are needed to tune on one")
        training.append(documents[:-kept])
        tuning.append(spread(documents[-kept:], measured_tokens))
    validation = [spread(documents_of(held_out, name), measured_tokens) for name in whole.tasks]
    parts = {"both": (whole, training), "tuning": (whole, tuning), "validation": (held_out, validation)}
    parts |= {name: (whole, [part]) for name, part in zip(("first", "second"), equal(training), strict=True)}
    made = {}
    for name, (source, domains) in parts.items():
        chosen = [place for domain in equal(domains) for place in domain]
        made[name] = subset(source, folder / name, chosen)
    first, second = whole.tasks
    return DomainData(
        (first, second), made["first"], made["second"], Splits(made["both"], made["tuning"], made["validation"])
    )


def documents_of(dataset: TokenDataset, task: str) -> list[Place]:
    """Where the documents of a task lie."""
    tasks = dataset.document_tasks(dataset.tasks) == dataset.tasks.index(task)
    return [place for place, chosen in zip(dataset.document_bounds(), tasks, strict=True) if chosen]


def spread(documents: Sequence[Place], tokens: int) -> list[Place]:
    """Documents at even distances, about `tokens` of them in all; of a long one only the beginning."""
    longest = tokens // min(len(documents), MOST_OF_A_DOCUMENT)
    cut = [(start, min(end, start + longest)) for start, end in documents]
    step = max(1, round(_tokens(cut) / tokens))
    return cut[::step]


def equal(domains: Sequence[Sequence[Place]]) -> list[list[Place]]:
    """Each domain's first documents, the last of them cut, so that all have as many tokens as the smallest (or one
    less, where that one would be a separator alone)."""
    size = min(_tokens(domain) for domain in domains)
    found: list[list[Place]] = []
    for domain in domains:
        left, kept = size, []
        for start, end in domain:
            if left > 1:
                kept.append((start, min(end, start + left)))
                left -= end - start
        found.append(kept)
    return found


def _tokens(documents: Sequence[Place]) -> int:
    return sum(end - start for start, end in documents)
