"""Writing one shard of a token stream: whole and hashed, or not there at all."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ncn.data.manifest import ShardRecord
from ncn.machine.files import PART_SUFFIX


class ShardWriter:
    """One shard, written under a temporary name until it is finished."""

    def __init__(self, out: Path, number: int, dtype: np.dtype[np.unsignedinteger], whole: hashlib._Hash) -> None:
        self.path = out / f"shard-{number:05d}.bin"
        self.part = self.path.with_name(self.path.name + PART_SUFFIX)
        self.file = self.part.open("wb")
        self.dtype, self.whole, self.own = dtype, whole, hashlib.sha256()
        self.tokens = self.text_bytes = 0
        self.documents: Counter[int] = Counter()
        """By the number of their source."""

    def append(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        content = tokens.tobytes()
        self.file.write(content)
        self.own.update(content)
        self.whole.update(content)
        self.tokens += len(tokens)

    def finish(self) -> ShardRecord:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.part, self.path)
        return ShardRecord(name=self.path.name, tokens=self.tokens, sha256=self.own.hexdigest())

    def close(self) -> None:
        """Drop the shard if it was not finished."""
        self.file.close()
        self.part.unlink(missing_ok=True)
