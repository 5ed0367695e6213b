"""Checkpoints: everything that the next step of a run depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ncn.errors import UserError

KEPT_CHECKPOINTS = 2
"""The newest, and one before it in case the newest turns out to be damaged."""


class Checkpoint(NamedTuple):
    """Tensors by name, and the small facts that go with them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint`; raises `UserError` if it is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "facts" not in metadata:
                raise UserError(f"{path} is not a checkpoint of this program; remove it")
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"]))  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error})") from None
