"""Tensors on disk, in safetensors."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ncn.machine.files import PART_SUFFIX, flush_to_disk, readable_as_usual

_FRAMEWORK = {"format": "pt"}
"""transformers refuses a file that does not name its framework."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _FRAMEWORK) -> None:
    """Write a safetensors file under a temporary name, and rename it once it is on disk.

    Raises `OSError` where it cannot be written.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    # safetensors refuses tensors that share memory, and wants them contiguous
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, part, metadata=dict(metadata))
        readable_as_usual(part)
        flush_to_disk(part)
        os.replace(part, path)
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    finally:
        if part.is_file():
            part.unlink()
