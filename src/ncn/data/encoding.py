"""Documents to token arrays on all cores, in order and with bounded memory."""

import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ncn.data.sources import Piece, Source
from ncn.data.tokenizer import Tokenizer

_BATCH_PIECES, _BATCH_BYTES = 64, 1 << 20


class Place(NamedTuple):
    """Where a piece stands: its document's number within its source, and the source's number."""

    source: int
    document: int


Placed = tuple[Place, Piece]
Encoded = tuple[npt.NDArray[np.unsignedinteger], list[int]]


def placed_pieces(sources: list[Source], start: Place) -> Iterator[Placed]:
    for number in range(start.source, len(sources)):
        skip = start.document if number == start.source else 0
        document = skip - 1
        for piece in sources[number].pieces(skip):
            document += piece.first
            yield Place(number, document), piece


def _batches(pieces: Iterable[Placed]) -> Iterator[list[Placed]]:
    batch: list[Placed] = []
    size = 0
    for placed in pieces:
        batch.append(placed)
        size += placed[1].bytes
        if len(batch) == _BATCH_PIECES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_in_order(
    tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger], pieces: Iterator[Placed], workers: int
) -> Iterator[tuple[list[Placed], Encoded]]:
    """Batches of pieces with their tokens, in order; a few batches ahead at most, so that memory stays bounded.

    Threads do the work, not processes: the library releases the interpreter's lock while it encodes, and threads share
    the tokenizer's cache of words and start at once.
    """
    batches = _batches(pieces)
    waiting: deque[tuple[list[Placed], Future[Encoded]]] = deque()
    with _no_inner_threads(), ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode_batch, tokenizer, dtype, batch)))
                if len(waiting) > 3 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_batch(tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger], batch: list[Placed]) -> Encoded:
    """The tokens of the pieces, a separator before each that begins a document, and where each piece's tokens end."""
    tokens, ends = array("I"), []
    for (_, piece), ids in zip(batch, tokenizer.encode_batch([piece.text for _, piece in batch]), strict=True):
        if piece.first:
            tokens.append(tokenizer.separator_id)
        tokens.extend(array("I", ids))
        ends.append(len(tokens))
    return np.frombuffer(tokens, dtype=np.uint32).astype(dtype), ends


@contextmanager
def _no_inner_threads() -> Iterator[None]:
    """Keeps the tokenizers library from starting threads of its own: `workers` says how many there are."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
