"""Reading the folder of an A/B experiment: what was run, what has finished, and whether it may be compared at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ncn.errors import UserError
from ncn.machine.files import read_json
from ncn.training.run_folder import RunFolder

FORMAT = 1
EVALUATION_BATCH = 16
"""Sequences in a batch of `ncn.inference.evaluate.evaluate`, which stops at the end of one."""

_FACTS = ("arms", "seeds", "data", "preset", "tokens_per_run", "steps", "environment", "command")
_ARM_FACTS = ("label", "role", "recipe", "parameters", "flops_per_token", "seconds_per_step")

Points = NDArray[np.float64]
"""Shape (points, 2): tokens seen, and validation loss in nats per token."""


@dataclass(frozen=True)
class Arm:
    """One model of the comparison; `flops_per_token` are those of a forward pass."""

    name: str
    label: str
    role: str
    recipe: dict[str, Any]
    parameters: int
    flops_per_token: float
    seconds_per_step: float


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed. Only a finished run has `nats`, the loss of each document."""

    arm: str
    seed: int
    folder: Path
    state: Literal["finished", "diverged", "unfinished"]
    nats: NDArray[np.float64] | None = None
    batches: str | None = None


@dataclass(frozen=True)
class Tuning:
    """Loss on the tuning split by learning rate, in units of the recipe's; None where the run diverged."""

    losses: dict[float, float | None]
    best: float | None

    @property
    def at_edge(self) -> Literal["lowest", "highest"] | None:
        """Whether the best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
        if self.best is None or len(self.losses) < 2:
            return None
        return "lowest" if self.best == min(self.losses) else "highest" if self.best == max(self.losses) else None


@dataclass(frozen=True)
class Experiment:
    """An experiment folder, read and checked.

    `text_bytes` and `tokens` are those of each validation document, the same in all runs; empty while none has
    finished.
    """

    folder: Path
    facts: dict[str, Any]
    arms: dict[str, Arm]
    seeds: list[int]
    tuning: dict[str, Tuning]
    runs: dict[tuple[str, int], Run]
    text_bytes: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @classmethod
    def open(cls, folder: str | Path) -> Experiment:
        """Read the folder that `ncn ab` wrote.

        Raises:
            UserError: it is none, a file in it is damaged, or its runs may not be compared: they were trained on
                other batches or measured on other documents.
        """
        folder = Path(folder)
        if not (folder / "experiment.json").is_file():
            raise UserError(f"{folder} is not an experiment folder: it has no experiment.json; `ncn ab` makes one")
        facts = read_json(folder / "experiment.json")
        _require(facts, ("format",), folder)
        if facts["format"] != FORMAT:
            raise UserError(
                f"{folder} has format {facts['format']!r} and this version reads format {FORMAT}; "
                "make the report with the version that ran the experiment"
            )
        _require(facts, _FACTS, folder)
        arms = {}
        for name, entry in facts["arms"].items():
            _require(entry, _ARM_FACTS, folder)
            arms[name] = Arm(name=name, **{key: entry[key] for key in _ARM_FACTS})
        runs: dict[tuple[str, int], Run] = {}
        documents: dict[Path, dict[str, NDArray[Any]]] = {}
        for name in arms:
            for seed in facts["seeds"]:
                run, lengths = _read_run(folder, name, seed)
                runs[name, seed] = run
                documents |= {run.folder: lengths} if lengths else {}
        _check_batches(runs.values())
        sizes = _same_documents(documents)
        tuning = _read_tuning(folder / "tuning.json")
        return cls(folder, facts, arms, list(facts["seeds"]), tuning, runs, sizes["bytes"], sizes["tokens"])

    def finished(self, arm: str) -> list[int]:
        """The seeds with which the arm has been trained to the end."""
        return [seed for seed in self.seeds if self.runs[arm, seed].state == "finished"]

    def with_role(self, *roles: str) -> list[Arm]:
        return [arm for arm in self.arms.values() if arm.role in roles]

    def tuning_of(self, arm: Arm) -> Tuning | None:
        """The sweep that gave the arm its learning rate; the A/A twin takes the baseline's."""
        tuned = next((other.name for other in self.with_role("baseline")), "") if arm.role == "again" else arm.name
        return self.tuning.get(arm.name) or self.tuning.get(tuned)

    @property
    def ncn(self) -> Arm | None:
        return next(iter(self.with_role("ncn")), None)

    @property
    def controls(self) -> list[Arm]:
        """The arms that the NCN has to beat."""
        return self.with_role("baseline", "control")

    @property
    def tokens_per_step(self) -> float:
        return float(self.facts["tokens_per_run"] / self.facts["steps"])

    @cached_property
    def nats_to_bits_per_byte(self) -> float:
        """Bits per byte of the validation text for one nat per token of it."""
        return float(self.tokens.sum() / self.text_bytes.sum() / np.log(2))

    @cached_property
    def curves(self) -> dict[tuple[str, int], Points]:
        """The validation losses of each finished run, in the order of training, all on the same text.

        While it trains, a run may be validated on the first part of the text only. Its last validation is of all of
        it, and is taken here from the documents of that first part.
        """
        found = {}
        for key, run in self.runs.items():
            if run.nats is not None:
                lines = [line for line in RunFolder(run.folder).metrics() if "validation_loss" in line]
                points = np.array([(line["tokens"], line["validation_loss"]) for line in lines], float).reshape(-1, 2)
                part = self._validated_tokens(self.arms[run.arm].recipe)
                if len(points) and part < self.tokens.sum():
                    points[-1, 1] = _loss_of_first(part, run.nats, self.tokens)
                found[key] = points
        return found

    def _validated_tokens(self, recipe: dict[str, Any]) -> int:
        """How many tokens a validation during training covers: the wanted ones, rounded up to whole batches."""
        model, train = recipe.get("model", {}), recipe.get("train", {})
        context = train.get("context") or model.get("context_length")
        if not context or "eval_tokens" not in train:
            return int(self.tokens.sum())
        batch = int(context) * EVALUATION_BATCH
        return -(-int(train["eval_tokens"]) // batch) * batch


def _loss_of_first(count: int, nats: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Nats per token over the first `count` tokens of a text, the last of its documents in part."""
    share = np.clip((count - (np.cumsum(tokens) - tokens)) / tokens, 0, 1)
    return float(share @ nats / (share @ tokens))


def _require(facts: Any, keys: Iterable[str], folder: Path) -> None:
    missing = [key for key in keys if not isinstance(facts, dict) or key not in facts]
    if missing:
        raise UserError(f"{folder / 'experiment.json'} lacks {missing[0]!r}: it is damaged or not from `ncn ab`")


def _read_run(folder: Path, arm: str, seed: int) -> tuple[Run, dict[str, NDArray[Any]]]:
    path = folder / "runs" / arm / f"seed-{seed}"
    if not (path / "summary.json").is_file():
        return Run(arm, seed, path, "unfinished"), {}
    summary = read_json(path / "summary.json")
    if summary.get("diverged"):
        return Run(arm, seed, path, "diverged"), {}
    try:
        arrays = load_file(path / "documents.safetensors")
        lengths = {"bytes": arrays["bytes"], "tokens": arrays["tokens"]}
        nats = arrays["nats"].astype(np.float64)
    except FileNotFoundError:
        raise UserError(
            f"{path} has a summary and no documents.safetensors; remove it and run `ncn ab` again"
        ) from None
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path / 'documents.safetensors'} cannot be read ({error}); run `ncn ab` again") from None
    if not np.isfinite(nats).all():  # a model that is no longer a number at the very end
        return Run(arm, seed, path, "diverged"), {}
    return Run(arm, seed, path, "finished", nats, summary.get("batches_sha256")), lengths


def _check_batches(runs: Iterable[Run]) -> None:
    first: dict[int, Run] = {}
    for run in runs:
        if run.state != "finished":
            continue
        other = first.setdefault(run.seed, run)
        if run.batches != other.batches:
            raise UserError(
                f"{run.folder} and {other.folder} were not trained on the same batches, so that their difference "
                "means nothing; remove the one that was put there by hand and run `ncn ab` again"
            )


def _same_documents(documents: dict[Path, dict[str, NDArray[Any]]]) -> dict[str, NDArray[np.int64]]:
    if not documents:
        return {"bytes": np.zeros(0, np.int64), "tokens": np.zeros(0, np.int64)}
    (first, expected), *others = documents.items()
    for path, lengths in others:
        if not all(np.array_equal(lengths[key], expected[key]) for key in expected):
            raise UserError(
                f"{path} and {first} were measured on different documents; "
                "remove the one that was put there by hand and run `ncn ab` again"
            )
    return expected


def _read_tuning(path: Path) -> dict[str, Tuning]:
    if not path.is_file():
        return {}
    found = {}
    for name, entry in read_json(path).items():
        losses = {float(rate): loss for rate, loss in entry["losses"].items()}
        best = entry.get("best")
        found[name] = Tuning(dict(sorted(losses.items())), None if best is None else float(best))
    return found
