"""Files, written so that a reader, or a restart after a kill, sees the whole of one or none of it; JSON, and hashes."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from ncn.errors import UserError

ASSETS = Path(str(resources.files("ncn") / "assets"))
"""The files that ship with the package: texts, a model, tokenizers, a page."""
PART_SUFFIX = ".part"
"""Ends the temporary name of a file that is being written; such a file may be deleted at any time."""


def readable_as_usual(path: Path) -> None:
    """Give `path` the permissions of any new file: safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to a temporary name beside `path`, flush it to the disk, and rename it to
    `path`."""
    part = path.with_name(path.name + PART_SUFFIX)
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def flush_to_disk(path: Path) -> None:
    """Have the system write what it holds of a file, so that it outlasts a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def disk_problem_in_one_line(path: Path) -> Iterator[None]:
    """Context in which a full or unwritable disk becomes one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        # what safetensors met is told in words only
        full = next((text for number in _FULL if (text := os.strerror(number)) in reason), None)
        remedy = (
            "what was saved before is intact: free some space, then continue with --resume"
            if full
            else "choose a folder that can be written to"
        )
        raise UserError(f"cannot write to {path}: {full or reason}; {remedy}") from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def flat(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose keys are theirs joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, separator, f"{prefix}{key}{separator}") if inner else {prefix + key: value}
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


_HASH_BLOCK = 1 << 20


def file_sha256(path: Path, whole: "hashlib._Hash | None" = None) -> str:
    """SHA-256 of a file, in hexadecimal; its bytes also go into the running hash `whole`, if there is one."""
    own = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            own.update(block)
            if whole is not None:
                whole.update(block)
    return own.hexdigest()
