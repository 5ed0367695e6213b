"""A part of a dataset as a dataset of its own: its first documents, and those held out for tuning."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ncn.data.dataset import TokenDataset
from ncn.data.manifest import MANIFEST, Manifest, Request, ShardRecord, SourceRecord, TaskRecord, token_dtype
from ncn.data.prepare import SHARD_TOKENS
from ncn.errors import UserError
from ncn.machine.files import write_atomically

TUNING_SHARE = 0.05
TUNING_TOKENS = 2_048, 65_536
"""Bounds of the tuning split, in tokens."""


def first_documents(whole: TokenDataset, folder: Path, tokens: int) -> TokenDataset:
    """The first documents of `whole`, about `tokens` tokens of them, as a new dataset; all of it where it is no
    longer. Raises `UserError` where the folder holds something else."""
    starts = whole.document_starts()
    count = int(np.searchsorted(starts, tokens))
    if count >= len(starts):
        return whole
    border = int(starts[count])
    size = text_bytes(whole, 0, border)
    write_part(whole, folder, [(0, border)], tasks=_tasks(whole)[:count], documents=count, text_bytes=size)
    return TokenDataset.open(folder)


def hold_out(whole: TokenDataset, train: Path, tuning: Path) -> tuple[TokenDataset, TokenDataset]:
    """Two new datasets: the last documents of `whole`, about a twentieth of its tokens, and those before them.

    Raises `UserError` where there is too little to split, or where the folders hold a split of other data.
    """
    at_least, at_most = TUNING_TOKENS
    wanted = min(max(round(whole.tokens * TUNING_SHARE), at_least), at_most)
    starts = whole.document_starts()
    first = max(0, int(np.searchsorted(starts, whole.tokens - wanted, side="right")) - 1)
    border = int(starts[first])
    if border < whole.tokens // 2:
        raise UserError(
            f"{whole.folder} has {whole.tokens:,} tokens in {whole.documents:,} documents: too few to hold a tuning "
            f"split of {wanted:,} tokens out; give more text"
        )
    held, tasks = text_bytes(whole, border, whole.tokens), _tasks(whole)
    for folder, place, chosen, size in (
        (train, (0, border), slice(first), whole.text_bytes - held),
        (tuning, (border, whole.tokens), slice(first, None), held),
    ):
        write_part(whole, folder, [place], tasks=tasks[chosen], documents=len(starts[chosen]), text_bytes=size)
    return TokenDataset.open(train), TokenDataset.open(tuning)


def text_bytes(whole: TokenDataset, start: int, end: int) -> int:
    """UTF-8 bytes of the text of the documents from token `start` to `end`."""
    decode, starts = whole.tokenizer().decode, whole.document_starts()
    bounds = [*starts[(starts >= start) & (starts < end)].tolist(), end]
    return sum(len(decode(whole.read(a + 1, b - a - 1).tolist()).encode()) for a, b in itertools.pairwise(bounds))


def _tasks(whole: TokenDataset) -> npt.NDArray[np.int64]:
    """The task of each document, as `write_part` takes them."""
    return whole.document_tasks(whole.tasks) if whole.tasks else np.zeros(0, np.int64)


def write_part(
    whole: TokenDataset,
    folder: Path,
    places: Sequence[tuple[int, int]],
    *,
    tasks: npt.NDArray[np.int64],
    documents: int,
    text_bytes: int,
) -> None:
    """Stretches of `whole`, one after the other, as a dataset folder, unless the folder has them already.

    Each of the `places` is a position at which a document begins, and the one after the last. `tasks` are places in
    `whole.tasks`, one for each document; empty where there are none.
    """
    old = whole.manifest
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
        return
    folder.mkdir(parents=True, exist_ok=True)
    whole.tokenizer().save(folder)
    dtype, hashed = token_dtype(old.vocab_size), hashlib.sha256()
    shards: list[ShardRecord] = []
    pieces = [(p, min(SHARD_TOKENS, end - p)) for start, end in places for p in range(start, end, SHARD_TOKENS)]
    content = b""
    for (position, count), (_, following) in itertools.pairwise([*pieces, (0, SHARD_TOKENS)]):
        content += whole.read(position, count).astype(dtype).tobytes()
        if len(content) // dtype.itemsize + following <= SHARD_TOKENS:
            continue
        hashed.update(content)
        name = f"shard-{len(shards):05d}.bin"
        write_atomically(folder / name, content)
        own = hashlib.sha256(content).hexdigest()
        shards.append(ShardRecord(name=name, tokens=len(content) // dtype.itemsize, sha256=own))
        content = b""
    manifest = Manifest(
        tokens=sum(end - start for start, end in places),
        documents=documents,
        text_bytes=text_bytes,
        dtype=old.dtype,
        vocab_size=old.vocab_size,
        separator_id=old.separator_id,
        tokenizer_sha256=old.tokenizer_sha256,
        hash=hashed.hexdigest(),
        shards=tuple(shards),
        request=request,
        tasks=tuple(
            TaskRecord(name=whole.tasks[task], documents=len(list(same))) for task, same in itertools.groupby(tasks)
        ),
    )
    write_atomically(folder / MANIFEST, manifest.to_json())
