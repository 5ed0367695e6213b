"""Prepared data: a folder of token shards, and batches of it as a pure function of (seed, step).

A dataset folder holds `shard-00000.bin`, `shard-00001.bin`, ... (little-endian uint16 or uint32 token ids, nothing
else), `manifest.json` and `tokenizer.json`. The shards, one after the other, are one stream of tokens; every document
in it is the separator followed by the document's tokens, so that the separator is also the target that ends the
document before. `ncn.prepare` writes such a folder.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from ncn.config.training import IGNORED
from ncn.data.manifest import MANIFEST, Manifest, token_dtype
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.machine.files import file_sha256

_READ_BLOCK = 1 << 24


class Batch(NamedTuple):
    """Token ids, and for each position the id that follows it, or -100 where the position has no target."""

    inputs: Int64[Tensor, "batch tokens"]
    targets: Int64[Tensor, "batch tokens"]

    def chained(self, before: str) -> str:
        """The next link of a hash chain over batches: SHA-256 of the link before, the inputs and the targets."""
        link = hashlib.sha256(before.encode())
        for tensor in self:
            link.update(tensor.numpy().tobytes())
        return link.hexdigest()


class TokenDataset:
    """A prepared dataset, memory-mapped: opening it reads nothing but the manifest. Made by `TokenDataset.open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards: list[npt.NDArray[np.unsignedinteger]] = []
        dtype = token_dtype(manifest.vocab_size)
        for shard in manifest.shards:
            path = folder / shard.name
            expected, found = shard.tokens * dtype.itemsize, path.stat().st_size if path.is_file() else None
            if found is None:
                raise UserError(
                    f"{path} is missing: expected {expected} bytes; copy the folder again or prepare it anew"
                )
            if found != expected:
                raise UserError(
                    f"{path} is {'truncated' if found < expected else 'too long'}: expected {expected} bytes, "
                    f"found {found}; copy the folder again or prepare it anew"
                )
            self._shards.append(np.memmap(path, dtype=dtype, mode="r"))
        self._starts = np.cumsum([0, *(shard.tokens for shard in manifest.shards)]).tolist()
        if self._starts[-1] != manifest.tokens or manifest.tokens < 2:
            raise UserError(f"{folder / MANIFEST} does not add up: its shards hold {self._starts[-1]} tokens")
        self._epochs: dict[tuple[int, int, int], tuple[int, npt.NDArray[np.int64]]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "TokenDataset":
        """Open a dataset folder and check the sizes of its shards (`verify` checks their content).

        Raises:
            UserError: the folder is not prepared data, is unfinished, or a shard is missing or has the wrong size.
        """
        return cls(Path(folder), Manifest.read(Path(folder)))

    @property
    def tokens(self) -> int:
        """Tokens in the stream, separators included."""
        return self.manifest.tokens

    @property
    def documents(self) -> int:
        return self.manifest.documents

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text, the denominator of bits per byte."""
        return self.manifest.text_bytes

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def separator_id(self) -> int:
        return self.manifest.separator_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token stream: equal for equal data, whatever its folder and shards."""
        return self.manifest.hash

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises UserError if the one in the folder is another."""
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.fingerprint != self.manifest.tokenizer_sha256:
            raise UserError(f"{self.folder / 'tokenizer.json'} is not the tokenizer that made this data; restore it")
        return tokenizer

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the manifest's. Raises UserError naming the first that
        differs."""
        whole = hashlib.sha256()
        for shard in self.manifest.shards:
            if file_sha256(self.folder / shard.name, whole) != shard.sha256:
                raise UserError(
                    f"{self.folder / shard.name} is damaged: its bytes differ from those written; prepare it anew"
                )
        if whole.hexdigest() != self.manifest.hash:
            raise UserError(f"{self.folder / MANIFEST} is damaged: its hash is not that of its shards; prepare it anew")

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """`count` tokens of the stream from position `start` on."""
        assert 0 <= start <= start + count <= self.tokens
        tokens = np.empty(count, dtype=np.int64)
        if count:
            self._read(start, tokens)
        return tokens

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where in the stream the documents begin, each with its separator; shape (documents,)."""
        found = [
            first + start + np.flatnonzero(shard[start : start + _READ_BLOCK] == self.separator_id)
            for first, shard in zip(self._starts, self._shards, strict=False)
            for start in range(0, len(shard), _READ_BLOCK)
        ]
        return np.concatenate(found).astype(np.int64)

    def document_bounds(self) -> list[tuple[int, int]]:
        """Of each document, where its separator lies in the stream, and the place after its last token."""
        return list(itertools.pairwise([*self.document_starts().tolist(), self.tokens]))

    def document_bytes(self, bounds: Iterable[tuple[int, int]]) -> list[int]:
        """UTF-8 bytes of the texts of documents, or of their first tokens; each as in `document_bounds`."""
        decode = self.tokenizer().decode
        return [len(decode(self.read(start + 1, end - start - 1).tolist()).encode()) for start, end in bounds]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the documents belong to, in the order in which they come; empty without tasks."""
        return tuple(dict.fromkeys(record.name for record in self.manifest.tasks))

    def document_tasks(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """For each document the place of its task in `names`; shape (documents,).

        Raises `UserError` where the documents belong to no task, or to one that is not named.
        """
        if not self.tasks:
            raise UserError(
                f"the documents in {self.folder} belong to no tasks: prepare them with one --task for each source"
            )
        for name in self.tasks:
            if name not in names:
                raise UserError(
                    f"the documents in {self.folder} belong to the tasks {', '.join(self.tasks)}, and {name!r} is not "
                    f"among {', '.join(names)}: name all of them in controller.tasks"
                )
        records = self.manifest.tasks
        places = np.array([names.index(record.name) for record in records])
        return np.repeat(places, [record.documents for record in records])

    def epoch_windows(self, context: int) -> int:
        """Windows in an epoch: the stream's tokens over the context, rounded up."""
        return -(-self.tokens // context)

    def batch(self, seed: int, step: int, batch_size: int, context: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch of a training step: a pure function of its arguments, with no state to save or to lose.

        The stream is closed to a circle, and each epoch cuts it at a random offset into ⌈tokens / context⌉ windows, in
        a random order; offset and order are drawn from PCG64 seeded with (seed, epoch). Every token of the stream is
        the target of one position in an epoch: where the last window runs over tokens that the first one has, its
        targets are -100. Windows are counted without end over epochs, so a batch may hold the last windows of one
        epoch and the first of the next.

        Args:
            seed: chooses the offsets and orders; at least 0.
            step: counts batches from 0.
            batch_size: windows for this rank.
            context: tokens in a window.
            rank, world_size: the step's `batch_size * world_size` windows are dealt in contiguous slices, so that the
                ranks' batches put one after the other are the batch of one process with that many rows.

        Raises:
            UserError: an argument out of range.
        """
        if seed < 0 or step < 0:
            raise UserError(f"seed and step must be at least 0, not {seed} and {step}")
        _check_positive(batch_size=batch_size, context=context, world_size=world_size)
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to {world_size - 1} for a world size of {world_size}, not {rank}")
        rows = np.empty((batch_size, context + 1), dtype=np.int64)
        counts = np.full(batch_size, context)
        for row, (start, offset) in enumerate(
            self._row_starts(seed, (step * world_size + rank) * batch_size, batch_size, context)
        ):
            counts[row] = min(context, self.tokens - start)
            self._read((offset + start) % self.tokens, rows[row])
        return _to_batch(rows, counts)

    def batch_starts(self, seed: int, step: int, batch_size: int, context: int) -> npt.NDArray[np.int64]:
        """Where in the stream the rows of `batch` with these arguments begin; shape (batch,)."""
        rows = self._row_starts(seed, step * batch_size, batch_size, context)
        return np.array([(offset + start) % self.tokens for start, offset in rows])

    def _row_starts(self, seed: int, first: int, count: int, context: int) -> Iterator[tuple[int, int]]:
        """For `count` windows from number `first` on: where they begin in their epoch, and the epoch's offset."""
        windows = self.epoch_windows(context)
        for number in range(first, first + count):
            epoch, index = divmod(number, windows)
            offset, order = self._epoch(seed, epoch, windows)
            yield int(order[index]) * context, offset

    def windows(self, context: int, batch_size: int) -> Iterator[Batch]:
        """The whole stream once and in order, for evaluation, in non-overlapping windows that begin with nothing
        before them.

        Every token but the first, which is a separator, is a target once. The last window is filled up with separators
        whose targets are -100, and the last batch may have fewer rows.
        """
        _check_positive(batch_size=batch_size, context=context)
        targets = self.tokens - 1
        starts = range(0, targets, context)
        for first in range(0, len(starts), batch_size):
            chosen = starts[first : first + batch_size]
            rows = np.full((len(chosen), context + 1), self.separator_id, dtype=np.int64)
            counts = np.array([min(context, targets - start) for start in chosen])
            for row, start, count in zip(rows, chosen, counts, strict=True):
                self._read(start, row[: count + 1])
            yield _to_batch(rows, counts)

    def _epoch(self, seed: int, epoch: int, windows: int) -> tuple[int, npt.NDArray[np.int64]]:
        key = (seed, epoch, windows)
        if key not in self._epochs:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
            drawn = int(generator.integers(self.tokens)), generator.permutation(windows)
            # Two are kept, for batches that straddle a border between epochs.
            for old in list(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[key] = drawn
        return self._epochs[key]

    def _read(self, start: int, into: npt.NDArray[np.int64]) -> None:
        """Fill `into` with the tokens from `start` on, going round the circle where the stream ends."""
        shard = bisect.bisect_right(self._starts, start) - 1
        within, filled = start - self._starts[shard], 0
        while filled < len(into):
            piece = self._shards[shard][within : within + len(into) - filled]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard, within = (shard + 1) % len(self._shards), 0


def _to_batch(rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Batch:
    """Inputs and targets from rows of context + 1 tokens, each with targets at its first `counts` positions."""
    targets = rows[:, 1:].copy()
    for row in np.flatnonzero(counts < targets.shape[1]):
        targets[row, counts[row] :] = IGNORED
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets))


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def check_same_tokenizer(data: TokenDataset, valid: TokenDataset) -> None:
    """Raises `UserError` if the validation data was made by another tokenizer than the training data."""
    if valid.manifest.tokenizer_sha256 != data.manifest.tokenizer_sha256:
        raise UserError(
            f"{valid.folder} and {data.folder} were prepared with different tokenizers; "
            f"prepare the validation data with --tokenizer {data.folder}"
        )
