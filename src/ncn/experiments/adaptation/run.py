"""`ncn adapt`: what a controller on a base gains on text of another kind, and what it costs, beside the usual adapters.

Every method trains on the same batches in the same order, in the same precision, each at its own best learning rate,
which is chosen on a tuning split. What a run found is a small file of its own, so that an experiment goes on where it
was stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncn.config.model import ControllerConfig
from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset, check_same_tokenizer
from ncn.data.subsets import first_documents, hold_out
from ncn.errors import UserError
from ncn.experiments.adaptation.costs import measure_costs
from ncn.experiments.adaptation.lesson import TUNING_SEED, Lesson, losses_of, train_adapter
from ncn.experiments.adaptation.report import AdaptationReport, write_report
from ncn.inference.document_losses import DocumentLosses
from ncn.lab.plan import begin_experiment
from ncn.lab.tuning import best_rate, tune
from ncn.machine.devices import arithmetic, find_device
from ncn.machine.files import read_json, write_json
from ncn.machine.progress import TokensProgress
from ncn.machine.stopping import Interrupted, graceful_stop
from ncn.retrofit.adapters import LABELS, METHODS, SIZED, Adapted, Method, adapt, check_peft, matched_sizes
from ncn.retrofit.bases import load_base
from ncn.retrofit.recipe import check_base_tokenizer, retrofit_recipe

CENTRES: Mapping[Method, float] = {"ncn": 1e-2, "lora": 8e-3, "ia3": 1.6e-1, "prefix": 3.2e-1, "full": 2e-3}
"""Learning rates around which the search begins; see `ncn.lab.tuning`."""
SETTINGS = ("tokens=200_000", "batch_size=4", "warmup=0.05", "weight_decay=0")
"""What `retrofit_recipe` is changed to before the user's own settings."""


@dataclass(frozen=True)
class Plan:
    """A whole experiment. `new` and `old` are the texts that the results are of."""

    out: Path
    base: str
    recipe: Recipe
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    sizes: Mapping[Method, int]
    train: TokenDataset
    tuning: TokenDataset
    new: TokenDataset
    old: TokenDataset

    @property
    def controller(self) -> ControllerConfig:
        assert self.recipe.model.controller is not None
        return self.recipe.model.controller

    def fresh(self, method: Method) -> Adapted:
        """The base, read anew, with a new adapter."""
        base = load_base(self.base)
        base.to(find_device(self.recipe.train.device))  # type: ignore[arg-type]
        return adapt(base, method, self.sizes.get(method), self.controller)

    def lesson(self, rate: float, seed: int) -> Lesson:
        """How a run is trained, at a learning rate that is not a multiple."""
        config = self.recipe.train.model_copy(update={"learning_rate": rate, "seed": seed})
        device = find_device(config.device)
        return Lesson(self.train, config, device, arithmetic(config.precision, device))

    def facts(self) -> dict[str, Any]:
        """What must not change while an experiment goes on."""
        train = self.recipe.train.model_dump(mode="json", exclude={"learning_rate", "seed", "device"})
        return {
            "base": self.base,
            "base_sha256": weights_sha256(load_base(self.base)),
            "controller": self.controller.model_dump(mode="json"),
            "train": train,
            "sizes": dict(self.sizes),
            "centres": dict(CENTRES),
            "data": {name: getattr(self, name).fingerprint for name in ("train", "tuning", "new", "old")},
        }


def run_adaptation(
    base: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    valid: str | Path,
    old: str | Path,
    methods: Sequence[str] = METHODS,
    settings: Iterable[str] = (),
    seeds: int = 3,
    rank: int | None = None,
    eval_tokens: int = 60_000,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> AdaptationReport:
    """Run the experiment, or what is left of it, and write its report.

    Args:
        base: folder or hub name of a transformers model.
        out: the experiment's folder.
        data: dataset folder of the new domain, prepared with the base's tokenizer, to train and to tune on.
        valid: dataset folder of the new domain to report on.
        old: dataset folder of the domain that the base comes from.
        methods: some of METHODS.
        settings: of the controller and of the training, as in `ncn train --base`.
        seeds: compared runs of each method.
        rank: LoRA's, which the sizes of the others follow; by default what is nearest to the controller's size.
        eval_tokens: about how much of `valid` and of `old` is read, from the beginning on.

    Raises:
        UserError: unusable base, data, methods or settings; another experiment in `out`; a method that diverges at
            every rate.
        Interrupted: after Ctrl-C; what has finished is kept.
    """
    plan = make_plan(base, Path(out), data, valid, old, methods, settings, seeds, rank, eval_tokens)
    begin(plan)
    with graceful_stop() as stopped:
        experiment = _Running(plan, stopped, progress, say)
        best = {method: experiment.tune(method) for method in plan.methods}
        for seed, method in itertools.product(plan.seeds, plan.methods):
            experiment.run(method, best[method], seed)
        costs = plan.out / "costs.json"
        if not (costs.is_file() and read_json(costs)["step"].keys() >= set(plan.methods)):
            say("time of a step and of decoding, in turns")
            write_json(costs, measure_costs(plan.fresh, plan.lesson(1e-4, 1), plan.methods, stopped))
    return write_report(plan.out, plan.methods, plan.seeds)


def make_plan(
    base: str | Path,
    out: Path,
    data: str | Path,
    valid: str | Path,
    old: str | Path,
    methods: Sequence[str],
    settings: Iterable[str],
    seeds: int,
    rank: int | None,
    eval_tokens: int,
) -> Plan:
    """Everything that can be wrong is found out here."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise UserError(f"unknown method {', '.join(unknown) or '(none)'}; methods: {', '.join(METHODS)}")
    if min(seeds, eval_tokens, rank or 1) < 1:
        raise UserError("seeds, rank and eval-tokens must be at least 1")
    check_peft()
    recipe = retrofit_recipe(base, [*SETTINGS, *settings])
    sets = [TokenDataset.open(folder) for folder in (data, valid, old)]
    for dataset in sets:
        check_same_tokenizer(sets[0], dataset)
    check_base_tokenizer(base, sets[0], recipe.model.vocab_size)
    train, tuning = hold_out(sets[0], out / "data" / "train", out / "data" / "tuning")
    new = first_documents(sets[1], out / "data" / "new", eval_tokens)
    known = first_documents(sets[2], out / "data" / "old", eval_tokens)
    assert recipe.model.controller is not None
    sizes = matched_sizes(load_base(base).config, recipe.model.controller, rank)
    chosen = tuple(method for method in METHODS if method in methods)
    assert recipe.base is not None
    return Plan(out, recipe.base, recipe, chosen, tuple(range(1, seeds + 1)), sizes, train, tuning, new, known)


def begin(plan: Plan) -> None:
    """Write adaptation.json, with the base's own losses; or check that the plan is the one there."""

    def measure() -> dict[str, Any]:
        lesson = plan.lesson(1e-4, 1)
        base = Adapted("full", load_base(plan.base).to(lesson.device), [], lambda folder: None)  # type: ignore[arg-type]
        losses = {name: losses_of(base, getattr(plan, name), lesson) for name in ("new", "old")}
        return {
            "base_parameters": sum(parameter.numel() for parameter in base.model.parameters()),
            "dials": {method: f"{SIZED[method]} {size}" for method, size in plan.sizes.items()},
            "losses": {name: as_lists(found) for name, found in losses.items()},
        }

    begin_experiment(plan.out / "adaptation.json", plan.facts(), plan.recipe.train, measure)


class _Running:
    """The runs of a plan, each done once, with a bar over all of them."""

    def __init__(self, plan: Plan, stopped: Callable[[], bool], progress: bool, say: Callable[[str], None]) -> None:
        self.plan, self.stopped, self.progress, self.say = plan, stopped, progress, say
        self.runs = plan.out / "runs"
        self.runs.mkdir(exist_ok=True)

    def tune(self, method: Method) -> float:
        """The best multiple of the method's central rate."""
        label = LABELS[method]

        def tuning_losses(tries: list[tuple[Method, float]]) -> list[float | None]:
            return [self.run(one, multiple, TUNING_SEED).get("tuning_loss") for one, multiple in tries]

        losses = tune({label: method}, tuning_losses)[label]
        best = best_rate(losses)
        assert best is not None
        row = "  ".join(f"{CENTRES[method] * m:g}: {x or math.nan:.4f}" for m, x in losses.items())
        self.say(f"{label}: best rate {CENTRES[method] * best:g} (nats a token on the tuning split: {row})")
        return best

    def run(self, method: Method, multiple: float, seed: int) -> dict[str, Any]:
        """What a run found, from its file if it has finished already."""
        name = f"{method}-x{multiple:g}-seed{seed}"
        path = self.runs / f"{name}.json"
        if path.is_file():
            return read_json(path)
        plan = self.plan
        lesson = plan.lesson(CENTRES[method] * multiple, seed)
        torch.manual_seed(seed)
        adapted = plan.fresh(method)
        total = math.ceil(lesson.config.tokens / lesson.tokens_per_step)
        with TokensProgress(total * lesson.tokens_per_step, 0, self.progress) as bar:

            def step(done: int) -> None:
                bar.update(done * lesson.tokens_per_step, self._finished(), self._finished() + 1)
                if self.stopped():
                    raise Interrupted(f"stopped during {name}; {self._finished()} finished runs are kept in {plan.out}")

            found = train_adapter(adapted, lesson, total, step)
        found = {"method": method, "multiple": multiple, "rate": lesson.config.learning_rate, "seed": seed} | found
        if not found["diverged"]:
            found["parameters"] = adapted.num_parameters()
            if seed == TUNING_SEED:
                found["tuning_loss"] = losses_of(adapted, plan.tuning, lesson).loss
            else:
                found["bytes"] = adapted.save(plan.out / "adapters" / f"{method}-seed{seed}")
                found["losses"] = {
                    domain: losses_of(adapted, getattr(plan, domain), lesson).nats.tolist() for domain in ("new", "old")
                }
        write_json(path, found)
        return found

    def _finished(self) -> int:
        return sum(1 for _ in self.runs.glob("*.json"))


def as_lists(losses: DocumentLosses) -> dict[str, Any]:
    """For JSON."""
    return {name: values.tolist() for name, values in vars(losses).items()}


def weights_sha256(model: nn.Module) -> str:
    """One hash of all weights, their names included."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
