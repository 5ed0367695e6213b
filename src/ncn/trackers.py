"""Experiment trackers beside metrics.jsonl: TensorBoard, trackio and wandb, each through one small door."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ncn.errors import UserError
from ncn.runs import RunFolder

_INSTALL = {"tensorboard": 'pip install "ncn[train]"', "trackio": "pip install trackio", "wandb": "pip install wandb"}


class Tracker:
    """Sends every logged line to all trackers of a run."""

    def __init__(self, names: Sequence[str], run: RunFolder) -> None:
        self._board: Any = None
        self._services: list[Any] = []
        for name in names:
            if name == "tensorboard":
                self._board = _module("torch.utils.tensorboard", name).SummaryWriter(str(run.path / "tensorboard"))
            else:
                service = _module(name, name)
                service.init(project="ncn", name=run.path.name, config=run.recipe().model_dump(mode="json"))
                self._services.append(service)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line of metrics, nested names joined by slashes."""
        values = _flat(line)
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


@contextmanager
def open_trackers(names: Sequence[str], run: RunFolder) -> Iterator[Tracker]:
    """A tracker for the services called `names`; raises `UserError` when one is not installed."""
    tracker = Tracker(names, run)
    try:
        yield tracker
    finally:
        tracker.close()


def _module(path: str, name: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError:
        raise UserError(f"tracker {name} is not installed: {_INSTALL[name]}") from None


def _flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
