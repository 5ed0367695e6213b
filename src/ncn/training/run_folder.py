"""The run folder: everything that a training run leaves behind, and the reader of it.

=================  ====================================================================================
config.json        the whole recipe, resolved
env.json           versions, device, commit, and the fingerprint of the data
metrics.jsonl      one line per logged step; the last line of an interrupted write is never half there
checkpoints/       step-00000500.safetensors, ...: weights and optimiser state, the last two
tracking.json      what wandb and trackio know the run by, where it logs there
summary.json       the end result
documents          documents.safetensors: nats, tokens and UTF-8 bytes of every validation document
model/             the trained model as a saved folder: config.json, model.safetensors, tokenizer.json
loss.png           the loss curve
=================  ====================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.machine.files import (
    PART_SUFFIX,
    disk_problem_in_one_line,
    flat,
    flush_to_disk,
    read_json,
    write_atomically,
    write_json,
)
from ncn.training.checkpoints import Checkpoint, checkpoint_files, newest_checkpoint, write_checkpoint

FREE_SETTINGS = ("train.device", "train.trackers", "train.checkpoint_every")
"""Settings that may differ between a run and its continuation, because they do not change the result."""


class RunFolder:
    """One training run on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, environment: Mapping[str, Any]) -> RunFolder:
        """Begin a run; refuses a folder that already holds something."""
        run = cls(path)
        # A kill may have come between the two files below; the second one says that the run has begun.
        unfinished = {"env.json", *(name + PART_SUFFIX for name in ("env.json", "config.json"))}
        taken = run.path.exists() and not run.path.is_dir()
        if taken or (run.path.is_dir() and {entry.name for entry in run.path.iterdir()} - unfinished):
            hint = "add --resume to continue it, or " if (run.path / "config.json").exists() else ""
            raise UserError(f"{run.path} already exists and is not empty; {hint}choose another --out")
        with disk_problem_in_one_line(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.path / "env.json", environment)
            write_json(run.path / "config.json", recipe.model_dump(mode="json"))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run; raises `UserError` where there is none."""
        run = cls(path)
        if not (run.path / "config.json").is_file():
            raise UserError(f"{run.path} is not a run folder: it has no config.json")
        return run

    def recipe(self) -> Recipe:
        return Recipe.parse(read_json(self.path / "config.json"))

    def environment(self) -> dict[str, Any]:
        return read_json(self.path / "env.json")

    def check_unchanged(self, recipe: Recipe, data: Mapping[str, str | None]) -> None:
        """Raises `UserError` that names the difference if the run was begun with another recipe or other data.

        `data` holds the fingerprints of the training and validation data, and of the weights that the run begins at,
        as env.json does. What may differ is what does not change the result.
        """
        before, after = flat(self.recipe().model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
        for name in sorted(before.keys() | after.keys()):
            if name not in FREE_SETTINGS and before.get(name) != after.get(name):
                raise UserError(
                    f"the recipe has changed since the run began: {name} was {before.get(name)!r} and is now "
                    f"{after.get(name)!r}; resume with the old one, or start a new run"
                )
        environment = self.environment()
        for kind, option, what in (
            ("data", "--data", "the training data is not that"),
            ("validation", "--valid", "the validation data is not that"),
            ("start", "--start", "the weights to begin at are not those"),
        ):
            if environment.get(kind) != data.get(kind):
                raise UserError(f"{what} of the run in {self.path}; give the same {option} to resume")

    def summary(self) -> dict[str, Any]:
        """The end result; raises `UserError` for a run that has not finished."""
        if not (self.path / "summary.json").is_file():
            raise UserError(f"{self.path} has not finished; continue it with --resume")
        return read_json(self.path / "summary.json")

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def model_folder(self) -> Path:
        return self.path / "model"

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines, oldest first; a line that a kill left half-written is ignored."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with disk_problem_in_one_line(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def amend_metrics(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Put `facts` into the last logged line, which is returned. Doing it twice is the same as doing it once."""
        lines = self.metrics()
        lines[-1] |= facts
        self._write_metrics(lines)
        return lines[-1]

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after `step`: the steps from there on are about to be run again."""
        self._write_metrics([line for line in self.metrics() if line["step"] <= step])

    def _write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with disk_problem_in_one_line(self.path):
            write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return checkpoint_files(self.path / "checkpoints")

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and drop the oldest; returns its path."""
        metrics = self.path / "metrics.jsonl"
        with disk_problem_in_one_line(self.path):
            # After a power cut a checkpoint must not be there without the lines that were logged before it.
            if metrics.is_file():
                flush_to_disk(metrics)
            return write_checkpoint(self.path / "checkpoints", step, Checkpoint(tensors, facts))

    def load_checkpoint(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest readable checkpoint, None if there is none at all; `warn` is told of each that is damaged."""
        return newest_checkpoint(self.path / "checkpoints", warn)
