"""The study of two domains: its runs, what is measured on the trained models, and what is read from both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncn.config.model import ControllerConfig
from ncn.data.dataset import TokenDataset
from ncn.experiments.domains.forgetting import Curve
from ncn.experiments.domains.separation import measure_domains
from ncn.experiments.domains.texts import DomainData
from ncn.inference.document_losses import document_losses
from ncn.lab.arms import BASELINE, NCN, Arm
from ncn.lab.comparison import Plan
from ncn.lab.fleet import Job
from ncn.machine.files import read_json, write_json
from ncn.models.saved import load
from ncn.steering.documents import DocumentInputs
from ncn.training.run_folder import RunFolder

STATIC, WITH_TASKS = "static", "ncn-tasks"
LABELS = {STATIC: "learned constants", NCN: "NCN", WITH_TASKS: "NCN with task ids", BASELINE: "baseline"}
EQUAL_RATE = "second-at-equal-rate"
POINTS = 8
"""Measurements along the training on the second domain."""
MEASURED_TOKENS = 16_384
"""Of each domain, to tune on and to measure on."""


@dataclass(frozen=True)
class Study:
    """What is to be run, and where: a comparison on both domains, and for each of its runs one on the first domain and
    one that goes on with the second."""

    plan: Plan
    data: DomainData
    second_tokens: int

    def first_job(self, arm: Arm, seed: int, rate: float) -> Job:
        out = self.plan.out / "first" / arm.name / f"seed-{seed}"
        return Job(arm.at(seed, rate), self.data.first.folder, self.data.splits.validation.folder, out)

    def second_job(self, arm: Arm, seed: int, rate: float, part: str = "second") -> Job:
        train, model = self.plan.train, arm.recipe.model
        steps = math.ceil(self.second_tokens / (train.batch_size * (train.context or model.context_length)))
        recipe = arm.at(seed, rate, tokens=self.second_tokens, eval_every=max(1, steps // POINTS))
        first, out = (self.plan.out / name / arm.name / f"seed-{seed}" for name in ("first", part))
        return Job(recipe, self.data.second.folder, self.data.splits.validation.folder, out, start=first)


def measure(study: Study, arm: str, seed: int) -> dict[str, Any]:
    """What is measured on a model trained on both domains, left in measures/; done once.

    {"signals": as `measure_domains` gives it, for an arm with a controller; "unset", "wrong": bits per byte by domain
    without the tasks, and with the other domain's, for the arm with tasks}.
    """
    path = study.plan.out / "measures" / arm / f"seed-{seed}.json"
    if path.is_file():
        return read_json(path)
    model, _ = load(study.plan.out / "runs" / arm / f"seed-{seed}")
    splits = study.data.splits
    found: dict[str, Any] = {}
    controller = model.core_config.controller
    if controller is not None and controller.kind == "ncn":
        found["signals"] = measure_domains(model, splits.tuning, splits.validation, study.data.names)
        if controller.tasks:
            for kind, given in (("unset", None), ("wrong", swapped(splits.validation, controller))):
                losses = document_losses(model, splits.validation, document_inputs=given).by_task(splits.validation)
                found[kind] = {name: part.bits_per_byte for name, part in losses.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def swapped(data: TokenDataset, controller: ControllerConfig) -> DocumentInputs:
    """The tasks of the data's documents, each replaced by the other of the two."""
    given = DocumentInputs(data, controller)
    assert given.tasks is not None
    given.tasks = 1 - given.tasks
    return given


def losses_of(study: Study, part: str, arm: str, seed: int) -> Mapping[str, float]:
    """Bits per byte by domain at the end of a run in runs/ or first/."""
    return by_task(RunFolder.open(study.plan.out / part / arm / f"seed-{seed}").summary())


def by_task(facts: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte by domain in a run's summary, or in a line of its metrics."""
    return {name: part["validation_bits_per_byte"] for name, part in facts["validation_tasks"].items()}


def curve_of(study: Study, arm: str, seed: int, part: str = "second") -> Curve:
    """Bits per byte of both domains along the training on the second one."""
    names = study.data.names
    lines = RunFolder.open(study.plan.out / part / arm / f"seed-{seed}").metrics()
    points = [losses_of(study, "first", arm, seed), *(by_task(line) for line in lines if "validation_tasks" in line)]
    return Curve([point[names[0]] for point in points], [point[names[1]] for point in points])
