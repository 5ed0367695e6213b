"""Some documents of a dataset as a dataset of their own: its first ones, those held out for tuning, or any others."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ncn.data.dataset import TokenDataset
from ncn.data.manifest import MANIFEST, Manifest, Request, ShardRecord, SourceRecord, TaskRecord, token_dtype
from ncn.data.prepare import SHARD_TOKENS
from ncn.data.shards import ShardWriter
from ncn.errors import UserError
from ncn.machine.files import write_atomically

TUNING_SHARE = 0.05
TUNING_TOKENS = 2_048, 65_536
"""Bounds of the tuning split, in tokens."""

Place = tuple[int, int]
"""Where in the stream a document's separator lies, and the place after its last token."""


def first_documents(whole: TokenDataset, folder: Path, tokens: int) -> TokenDataset:
    """The first documents of `whole`, about `tokens` tokens of them, as a new dataset; all of it where it is no
    longer. Raises `UserError` where the folder holds something else."""
    documents = whole.document_bounds()
    count = int(np.searchsorted([start for start, _ in documents], tokens))
    return whole if count >= len(documents) else subset(whole, folder, documents[:count])


def hold_out(whole: TokenDataset, train: Path, tuning: Path) -> tuple[TokenDataset, TokenDataset]:
    """Two new datasets: the last documents of `whole`, about a twentieth of its tokens, and those before them.

    Raises `UserError` where there is too little to split, or where the folders hold a split of other data.
    """
    at_least, at_most = TUNING_TOKENS
    wanted = min(max(round(whole.tokens * TUNING_SHARE), at_least), at_most)
    documents = whole.document_bounds()
    starts = [start for start, _ in documents]
    first = max(0, int(np.searchsorted(starts, whole.tokens - wanted, side="right")) - 1)
    if starts[first] < whole.tokens // 2:
        raise UserError(
            f"{whole.folder} has {whole.tokens:,} tokens in {whole.documents:,} documents: too few to hold a tuning "
            f"split of {wanted:,} tokens out; give more text"
        )
    held = subset(whole, tuning, documents[first:])
    return subset(whole, train, documents[:first], text_bytes=whole.text_bytes - held.text_bytes), held


def subset(
    whole: TokenDataset, folder: Path, documents: Sequence[Place], *, text_bytes: int | None = None
) -> TokenDataset:
    """Documents of `whole`, one after the other, as a new dataset in `folder`, unless the folder has them already.

    Args:
        documents: as in `TokenDataset.document_bounds`; of each there may be only the beginning.
        text_bytes: UTF-8 bytes of their text, counted where this is not known.

    Raises:
        UserError: the folder holds something else.
    """
    old, places = whole.manifest, stretches(documents)
    origins = tuple(
        SourceRecord(name=f"tokens {start} to {end} of a dataset", bytes=old.text_bytes, version=old.hash)
        for start, end in places
    )
    request = Request(
        sources=origins,
        tokenizer_sha256=old.tokenizer_sha256,
        vocab_size=None,
        field="text",
        split="train",
        shard_tokens=SHARD_TOKENS,
    )
    if (folder / MANIFEST).is_file():
        if Manifest.read(folder).request != request:
            raise UserError(
                f"{folder} was made from other data than {whole.folder}; give the same data as before, or name "
                "another folder for the experiment"
            )
        return TokenDataset.open(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole.tokenizer().save(folder)
    hashed = hashlib.sha256()
    shards = _write_shards(whole, folder, places, hashed)
    manifest = Manifest(
        tokens=sum(end - start for start, end in places),
        documents=len(documents),
        text_bytes=sum(whole.document_bytes(documents)) if text_bytes is None else text_bytes,
        dtype=old.dtype,
        vocab_size=old.vocab_size,
        separator_id=old.separator_id,
        tokenizer_sha256=old.tokenizer_sha256,
        hash=hashed.hexdigest(),
        shards=shards,
        request=request,
        tasks=_task_records(whole, documents),
    )
    write_atomically(folder / MANIFEST, manifest.to_json())
    return TokenDataset.open(folder)


def stretches(documents: Iterable[Place]) -> list[Place]:
    """The same tokens in as few stretches as possible."""
    found: list[Place] = []
    for start, end in documents:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _write_shards(
    whole: TokenDataset, folder: Path, places: Iterable[Place], hashed: hashlib._Hash
) -> tuple[ShardRecord, ...]:
    """Write the tokens of the `places` in shards, and put them into the running hash `hashed`."""
    dtype, shards = token_dtype(whole.vocab_size), []
    writer = ShardWriter(folder, 0, dtype, hashed)
    try:
        for start, end in places:
            for position in range(start, end, SHARD_TOKENS):
                count = min(SHARD_TOKENS, end - position)
                if writer.tokens + count > SHARD_TOKENS:
                    shards.append(writer.finish())
                    writer = ShardWriter(folder, len(shards), dtype, hashed)
                writer.append(whole.read(position, count).astype(dtype))
        shards.append(writer.finish())
    finally:
        writer.close()
    return tuple(shards)


def _task_records(whole: TokenDataset, documents: Sequence[Place]) -> tuple[TaskRecord, ...]:
    """Which tasks the documents belong to, in their order; none where there are no tasks."""
    if not whole.tasks:
        return ()
    numbers = np.searchsorted(whole.document_starts(), [start for start, _ in documents])
    tasks = whole.document_tasks(whole.tasks)[numbers]
    return tuple(
        TaskRecord(name=whole.tasks[task], documents=len(list(same))) for task, same in itertools.groupby(tasks)
    )
