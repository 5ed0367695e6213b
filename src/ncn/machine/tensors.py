"""Tensors on disk, in safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ncn.machine.files import PART_SUFFIX, readable_as_usual


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, and rename it once it is on disk."""
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        # transformers refuses a file that does not name its framework
        save_file(tensors, part, metadata={"format": "pt"})
        readable_as_usual(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        if part.is_file():
            part.unlink()
