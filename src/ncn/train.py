"""One training loop for every arm: baseline, static and local gates, and the controller."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncn.compiling import compiled
from ncn.config import Recipe, TrainConfig
from ncn.control_inputs import hold_still_but_inputs
from ncn.data import TokenDataset
from ncn.devices import arithmetic, find_device
from ncn.document_inputs import DocumentInputs
from ncn.errors import UserError
from ncn.evaluate import DocumentLosses, document_losses, evaluate
from ncn.fitting import check_same_tokenizer, fit_to_data, identify
from ncn.loss import IGNORED
from ncn.memory import keep_freed_memory
from ncn.model import ModulatedTransformer
from ncn.optimizers import build_optimizers, learning_rate_factor, load_optimizer_state, optimizer_state
from ncn.progress import TrainingProgress
from ncn.runs import RunFolder, describe_environment, disk_problem_in_one_line, write_json
from ncn.signals import controller_problem, homeostatic_loss, signal_statistics
from ncn.stopping import Interrupted, graceful_stop
from ncn.store import load_start, save_model
from ncn.trackers import Tracker, check_installed, open_trackers
from ncn.types import ControlInputs


@dataclass
class Accumulated:
    """Sums since the last logged line. They travel in the checkpoint, so that a resumed run logs the same lines."""

    loss: float = 0.0
    homeostatic: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0


class Diverged(UserError):
    """The loss, its gradient or a weight is no longer a number."""


@dataclass
class Training:
    """A run in progress: model, data, optimisers, and how far it is. `train` makes one and runs it."""

    recipe: Recipe
    run: RunFolder
    dataset: TokenDataset
    valid: TokenDataset | None
    model: ModulatedTransformer
    device: torch.device
    autocast: torch.dtype | None
    given: DocumentInputs | None = None
    valid_given: DocumentInputs | None = None
    step: int = 0
    sums: Accumulated = field(default_factory=Accumulated)
    warned: bool = False
    batches_sha256: str = ""
    """Hash chain of the batches so far: equal for runs that were trained on the same tokens in the same order."""

    def __post_init__(self) -> None:
        self.config: TrainConfig = self.recipe.train
        self.context = self.config.context or self.recipe.model.context_length
        self.tokens_per_step = self.config.batch_size * self.context
        self.total_steps = math.ceil(self.config.tokens / self.tokens_per_step)
        self.optimizers = build_optimizers(self.model, self.config)
        self.loss = self.model.loss
        if self.config.compile:
            self.model.hidden_states = compiled(self.model.hidden_states)  # type: ignore[method-assign]

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the signals of its last micro-batch."""
        batch = self.dataset.batch(self.config.seed, self.step, self.config.batch_size, self.context)
        count = (batch.targets != IGNORED).sum().item()
        factor = learning_rate_factor(self.config, self.step, self.total_steps)
        weight = self.config.homeostatic_weight
        if self.config.homeostatic_schedule == "annealed":
            weight *= 1 - self.step / self.total_steps
        loss_sum = homeostatic_sum = 0.0
        signals: dict[str, Tensor] = {}
        size = -(-self.config.batch_size // self.config.accumulation)
        control, shares = self._given()
        for first in range(0, self.config.batch_size, size):
            rows = slice(first, first + size)
            inputs, targets = batch.inputs[rows].to(self.device), batch.targets[rows].to(self.device)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                nats, signals = self.loss(
                    inputs,
                    targets,
                    chunk=self.config.loss_chunk,
                    control=None if control is None else control.of_rows(rows),
                    shares=None if shares is None else shares[rows],
                )
                objective = nats / count
                share = len(inputs) / self.config.batch_size
                homeostatic = homeostatic_loss(signals) * share if signals else objective.new_zeros(())
                if weight:
                    objective = objective + weight * homeostatic
            objective.backward()  # type: ignore[no-untyped-call]
            loss_sum += nats.item() / count
            homeostatic_sum += homeostatic.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if not math.isfinite(loss_sum + norm):
            raise self.not_a_number("loss or its gradient")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        self.step += 1
        self.batches_sha256 = batch.chained(self.batches_sha256)
        self.sums.loss += loss_sum
        self.sums.homeostatic += homeostatic_sum
        self.sums.grad_norm += norm
        self.sums.steps += 1
        return signals

    def _given(self) -> tuple[ControlInputs | None, Tensor | None]:
        """What this step's batch is given from outside, and how many times each of its targets counts."""
        config = self.config
        if self.given is None:
            return None, None
        batch = config.seed, self.step, config.batch_size, self.context
        control = self.given.batch(*batch, config.input_dropout, config.single_input_dropout)
        shares = self.given.shares(*batch, control)
        return control.to(self.device), None if shares is None else shares.to(self.device)

    def not_a_number(self, what: str) -> Diverged:
        kept = f"the last good checkpoint stays in {self.run.path / 'checkpoints'}; " if self.run.checkpoints() else ""
        return Diverged(
            f"the {what} is no longer a number at step {self.step}: {kept}"
            "start a new run with a lower learning rate or a longer warmup"
        )

    def controller_grad_norm(self) -> float:
        """Norm of the controller's gradient, after clipping; 0 without a controller."""
        if self.model.controller is None:
            return 0.0
        grads = [p.grad.norm() for p in self.model.controller.parameters() if p.grad is not None]
        return torch.stack(grads).norm().item() if grads else 0.0

    def line(self, signals: Mapping[str, Tensor], speed: float, seconds: float) -> dict[str, Any]:
        """What is logged: averages over the steps since the last line, and the signals of the last step."""
        controller = self.recipe.model.controller
        loss = self.sums.loss / self.sums.steps
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": loss,
            "bits_per_byte": self.bits_per_byte(loss),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": self.sums.grad_norm / self.sums.steps,
        }
        if controller is not None:
            statistics = signal_statistics(signals, controller.maps)
            line |= {
                "homeostatic_loss": self.sums.homeostatic / self.sums.steps,
                "controller_grad_norm": self.controller_grad_norm(),
                "signals": statistics,
            }
        return line | {"tokens_per_second": speed, "seconds": seconds}

    def warn_once(self, line: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Say it when a signal saturates or the controller is stuck, once in a run, and not while it finds its feet."""
        controller = self.recipe.model.controller
        if controller is None or self.warned or self.step <= self.total_steps // 10:
            return
        problem = controller_problem(controller, line["signals"])
        if problem:
            self.warned = True
            say(f"warning at step {self.step}: {problem}")

    def bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) * self.dataset.tokens / self.dataset.text_bytes

    def validate(self) -> dict[str, Any]:
        """Validation loss on the first `eval_tokens`, or on everything and by task where the data has tasks; empty
        without validation data."""
        if self.valid is None:
            return {}
        if self.valid.tasks:
            return self._document_losses(self.valid).validation_facts(self.valid)
        limit = self.config.eval_tokens
        found = evaluate(self.model, self.valid, context=self.context, max_tokens=limit, autocast=self.autocast)
        return found.validation_facts()

    def validate_documents(self) -> dict[str, Any]:
        """Validation loss on everything, which is left document by document in documents.safetensors."""
        if self.valid is None:
            return {}
        losses = self._document_losses(self.valid)
        with disk_problem_in_one_line(self.run.path):
            losses.save(self.run.path / "documents.safetensors")
        return losses.validation_facts(self.valid)

    def _document_losses(self, valid: TokenDataset) -> DocumentLosses:
        return document_losses(self.model, valid, context=self.context, autocast=self.autocast, given=self.valid_given)

    def save(self, seconds: float) -> Path:
        """Write a checkpoint of everything that the next step depends on."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise self.not_a_number("model")
        tensors |= optimizer_state(self.model, self.optimizers)
        facts = {
            "step": self.step,
            "sums": vars(self.sums),
            "seconds": seconds,
            "data": self.dataset.fingerprint,
            "autocast": str(self.autocast),
            "warned": self.warned,
            "batches_sha256": self.batches_sha256,
        }
        return self.run.save_checkpoint(self.step, tensors, facts)

    def restore(self, warn: Callable[[str], None]) -> float:
        """Continue from the newest good checkpoint, if there is one; returns the seconds trained until then."""
        checkpoint = self.run.load_checkpoint(warn)
        if checkpoint is None:
            self.run.truncate_metrics(0)
            return 0.0
        facts = checkpoint.facts
        if facts["data"] != self.dataset.fingerprint:
            raise UserError(f"the checkpoint of {self.run.path} is of a run on other data; give --data of that run")
        if facts["autocast"] != str(self.autocast):
            warn(
                f"the run used {facts['autocast']} until now and goes on with {self.autocast}: not bit for bit the same"
            )
        weights = {
            name.removeprefix("model."): t for name, t in checkpoint.tensors.items() if name.startswith("model.")
        }
        try:
            self.model.load_state_dict(weights)
        except RuntimeError:
            raise UserError(
                f"the newest checkpoint in {self.run.path / 'checkpoints'} is of another model; remove it"
            ) from None
        load_optimizer_state(self.model, self.optimizers, checkpoint.tensors)
        self.step, self.sums, self.warned = facts["step"], Accumulated(**facts["sums"]), facts["warned"]
        self.batches_sha256 = facts["batches_sha256"]
        self.run.truncate_metrics(self.step)
        return float(facts["seconds"])


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    start: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a model by `recipe` on prepared `data` and leave a run folder at `out`; returns its summary.

    The model's vocabulary and separator are taken from the data. It begins at random weights, or at those of `start`,
    a trained model of the same configuration. Validation gives a model with tasks the tasks of the validation data; it
    gives it no sliders and no instructions, which may be taken from the very text that is to be predicted. With
    `resume`, an interrupted run continues bit for bit (on CPU), one that never began begins, and a finished one returns
    its summary. Raises `UserError` for unusable data or folders, a changed recipe or changed data on resume, a full
    disk, and a loss that is no longer a number; `Interrupted` after Ctrl-C.
    """
    keep_freed_memory()
    training = begin(recipe, data, out, valid=valid, start=start, resume=resume)
    if training.run.finished:
        say(f"{training.run.path} is finished already")
        return training.run.summary()
    seconds = training.restore(say) if resume else 0.0
    begun = time.monotonic() - seconds
    with open_trackers(recipe.train.trackers, training.run, training.step) as tracker:
        with graceful_stop() as stopped:
            _loop(training, begun, tracker, stopped, progress, say)
        return _finish(training, begun, tracker)


def begin(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None,
    start: str | Path | None = None,
    resume: bool,
) -> Training:
    """Open the data, build the model at its initial weights, and create or reopen the run folder.

    The folder comes last, so that a mistake leaves none behind.
    """
    check_installed(recipe.train.trackers)
    dataset = TokenDataset.open(data)
    dataset.tokenizer()  # a run that cannot save its tokenizer in the end should not begin
    valid_set = TokenDataset.open(valid) if valid else None
    recipe = fit_to_data(recipe, dataset)
    controller = recipe.model.controller
    if recipe.train.balance_sliders and not (controller and controller.sliders):
        raise UserError("train.balance_sliders needs sliders to balance, such as controller.sliders=[length]")
    given = DocumentInputs.of(dataset, controller, recipe.train.balance_sliders)
    tasks_alone = controller and controller.override(sliders=(), instructions=False)
    valid_given = DocumentInputs.of(valid_set, tasks_alone) if valid_set and valid_set.tasks else None
    context = recipe.train.context or recipe.model.context_length
    if dataset.tokens < context:
        raise UserError(
            f"the data's {dataset.tokens} tokens are less than one window of {context}; prepare more, or lower context"
        )
    device = find_device(recipe.train.device)
    autocast = arithmetic(recipe.train.precision, device)
    torch.manual_seed(recipe.train.seed if recipe.train.init_seed is None else recipe.train.init_seed)
    model = _build(recipe, device)
    if valid_set:
        check_same_tokenizer(dataset, valid_set)
    identity = identify(dataset, valid_set, start)
    if recipe.train.only_inputs and (recipe.base or not start):
        why = "leave it out on a base, which is held still anyway" if recipe.base else "it needs --start MODEL"
        raise UserError(f"train.only_inputs is for a model that is trained already: {why}")
    if start:
        load_start(model, start, dataset.manifest.tokenizer_sha256)
    if recipe.train.only_inputs:
        hold_still_but_inputs(model)
    if resume and (Path(out) / "config.json").exists():
        run = RunFolder.open(out)
        run.check_unchanged(recipe, identity)
    else:
        run = RunFolder.create(out, recipe, describe_environment(device, autocast=str(autocast), **identity))
    return Training(recipe, run, dataset, valid_set, model, device, autocast, given, valid_given)


def _build(recipe: Recipe, device: torch.device) -> ModulatedTransformer:
    if recipe.base is None:
        return ModulatedTransformer(recipe.model).to(device)
    from ncn.retrofit.model import build_retrofitted

    return build_retrofitted(recipe, device)


def _loop(
    training: Training,
    begun: float,
    tracker: Tracker,
    stopped: Callable[[], bool],
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Train until the last step, and leave its checkpoint; or until asked to stop."""
    config, run, total = training.config, training.run, training.total_steps
    logged_at, logged_step = time.monotonic(), training.step
    with TrainingProgress(total, training.tokens_per_step, training.step, progress) as bar:
        while training.step < total:
            signals = training.train_step()
            last = training.step == total
            validates = training.valid is not None and training.step % config.eval_every == 0 and not last
            line = None
            if training.step % config.log_every == 0 or validates or last:
                now = time.monotonic()
                speed = (training.step - logged_step) * training.tokens_per_step / (now - logged_at)
                line = training.line(signals, speed, now - begun)
                if validates:
                    line |= training.validate()
                training.warn_once(line, say)
                run.append_metrics(line)
                tracker.log(line)
                training.sums = Accumulated()
                logged_at, logged_step = time.monotonic(), training.step
            bar.update(training.step, line)
            for optimizer in training.optimizers:
                optimizer.zero_grad()
            stop = stopped() and not last
            if stop or last or training.step % config.checkpoint_every == 0:
                training.save(time.monotonic() - begun)
            if stop:
                raise Interrupted(f"stopped at step {training.step} of {total}, saved in {run.path}")


def _finish(training: Training, begun: float, tracker: Tracker) -> dict[str, Any]:
    """Validate, save the trained model, draw the curve, and, last of all, write the summary that says "finished"."""
    from ncn.plot import loss_curve, published_curve

    run = training.run
    best = training.validate_documents()
    line = run.amend_metrics(best)
    tracker.log({"step": training.step, **best})
    seconds = time.monotonic() - begun
    gpt2 = training.recipe.model.vocab_size == 50257
    with disk_problem_in_one_line(run.path):
        save_model(training.model, run.model_folder, training.dataset.tokenizer())
        loss_curve(run.metrics(), run.path / "loss.png", published=published_curve() if gpt2 else None)
    summary = {
        "steps": training.total_steps,
        "tokens": line["tokens"],
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "loss": line["loss"],
        **best,
        "seconds": seconds,
        "tokens_per_second": line["tokens"] / seconds,
        "batches_sha256": training.batches_sha256,
    }
    with disk_problem_in_one_line(run.path):
        write_json(run.path / "summary.json", summary)
    return summary
