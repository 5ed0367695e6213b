"""What a dataset folder says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ncn.errors import UserError

MANIFEST = "manifest.json"
JOURNAL = "progress.json"


class Record(BaseModel):
    """Base of what is written as JSON: fixed once made, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


class ShardRecord(Record):
    name: str
    tokens: int
    sha256: str


class SourceRecord(Record):
    """Where documents came from. `version` is a file's SHA-256, or the revision of a hub dataset."""

    name: str
    bytes: int
    version: str


class Request(Record):
    """What `prepare` was asked to do; two preparations with equal requests write equal bytes."""

    sources: tuple[SourceRecord, ...]
    tokenizer_sha256: str | None
    vocab_size: int | None
    field: str
    split: str
    shard_tokens: int
    tasks: tuple[str, ...] = ()


class TaskRecord(Record):
    """The next so many documents of the stream belong to this task."""

    name: str
    documents: int


class Manifest(Record):
    """What a dataset folder holds. `text_bytes` counts the documents' text in UTF-8, separators left out; `hash` is the
    SHA-256 of all token bytes in order, whatever the sizes of the shards; `tasks` say of every document, in order, to
    which task it belongs, and are empty where documents belong to none."""

    format_version: Literal[1] = 1
    tokens: int
    documents: int
    text_bytes: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    separator_id: int
    tokenizer_sha256: str
    hash: str
    shards: tuple[ShardRecord, ...]
    request: Request
    tasks: tuple[TaskRecord, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises UserError where the folder holds no manifest or one that cannot be read."""
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / JOURNAL).is_file():
                raise UserError(
                    f"{folder} is not ready: its preparation was interrupted; run the same ncn prepare again"
                )
            raise UserError(f"{folder} holds no prepared data: make it with ncn prepare SOURCE --out {folder}")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "file"
            raise UserError(f"{path} cannot be read ({place}: {first['msg']}); prepare the data again") from None


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The type of a stored token id: uint16, or uint32 for a vocabulary of more than 65 535 tokens; little-endian."""
    return np.dtype("<u4" if vocab_size > 65535 else "<u2")
