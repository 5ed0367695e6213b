"""Experiment trackers beside metrics.jsonl: TensorBoard, trackio and wandb, each through one small door."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ncn.errors import UserError
from ncn.machine.files import disk_problem_in_one_line, flat, read_json, write_json
from ncn.training.run_folder import RunFolder

_INSTALL = {"tensorboard": "pip install tensorboard", "trackio": "pip install trackio", "wandb": "pip install wandb"}


class Tracker:
    """Sends every logged line to all trackers of a run, which has `step` steps behind it."""

    def __init__(self, names: Sequence[str], run: RunFolder, step: int) -> None:
        self._board: Any = None
        self._services: list[Any] = []
        for name in names:
            if name == "tensorboard":
                board = importlib.import_module("torch.utils.tensorboard")
                # What was logged after the checkpoint that the run goes on from will be logged again.
                self._board = board.SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)
            else:
                service = importlib.import_module(name)
                identity = tracking_id(run)
                # wandb goes on with the run of this id, trackio with that of this name, which must then be unique.
                who = {"id": identity} if name == "wandb" else {}
                called = run.path.name if who else f"{run.path.name}-{identity}"
                recipe = run.recipe().model_dump(mode="json")
                service.init(project="ncn", name=called, config=recipe, resume="allow", **who)
                self._services.append(service)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line of metrics, nested names joined by slashes."""
        values = flat(line, "/")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, line["step"])
        for service in self._services:
            service.log(values, step=line["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        for service in self._services:
            service.finish()


def tracking_id(run: RunFolder) -> str:
    """What services know the run in this folder by: drawn once, and kept in tracking.json when the folder moves."""
    path = run.path / "tracking.json"
    if not path.is_file():
        with disk_problem_in_one_line(run.path):
            write_json(path, {"id": secrets.token_hex(8)})
    return str(read_json(path)["id"])


def check_installed(names: Sequence[str]) -> None:
    """Raises `UserError` with the install command for the first of the trackers that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: {_INSTALL[name]}")


@contextmanager
def open_trackers(names: Sequence[str], run: RunFolder, step: int) -> Iterator[Tracker]:
    """A tracker for the services called `names`, open while the context lasts."""
    tracker = Tracker(names, run, step)
    try:
        yield tracker
    finally:
        tracker.close()
