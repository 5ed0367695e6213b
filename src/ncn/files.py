"""Writing files so that a reader, or a restart after a kill, sees the whole file or none of it."""

import os
from pathlib import Path

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
