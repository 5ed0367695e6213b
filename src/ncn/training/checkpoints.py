"""Checkpoints of a run, in a folder of their own: everything that its next step depends on, the last two times."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ncn.errors import UserError
from ncn.machine.files import PART_SUFFIX
from ncn.machine.tensors import write_tensors

KEPT_CHECKPOINTS = 2
"""The newest, and one before it in case the newest turns out to be damaged."""


class Checkpoint(NamedTuple):
    """Tensors by name, and the small facts that go with them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, and only when it is whole on the disk drop those that are no longer kept; returns its path.

    Raises `OSError` where it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, checkpoint.tensors, {"facts": json.dumps(dict(checkpoint.facts))})
    for old in checkpoint_files(folder)[KEPT_CHECKPOINTS:]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest readable checkpoint in a folder, None if there is none at all; `warn` is told of each that is damaged.

    What a kill left of a checkpoint is cleared away. Raises `UserError` where all are damaged.
    """
    # safetensors writes to .tmp... itself
    for leftover in [*folder.glob(f"*{PART_SUFFIX}"), *folder.glob(".tmp*")]:
        leftover.unlink()
    found = checkpoint_files(folder)
    for path in found:
        try:
            return read_checkpoint(path)
        except UserError as error:
            warn(str(error))
    if found:
        raise UserError(f"no checkpoint in {folder} can be read; start the run anew")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint written by `write_checkpoint`; raises `UserError` if it is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "facts" not in metadata:
                raise UserError(f"{path} is not a checkpoint of this program; remove it")
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"]))  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error})") from None
