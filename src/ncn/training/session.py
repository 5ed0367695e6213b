"""A training run in progress: its step, and what it logs, validates and saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncn.config.recipe import Recipe
from ncn.config.training import IGNORED, TrainConfig
from ncn.core.interface import LanguageModel
from ncn.core.signals.statistics import controller_problem, signal_statistics
from ncn.core.types import ControlInputs
from ncn.data.dataset import Batch, TokenDataset
from ncn.errors import UserError
from ncn.inference.document_losses import DocumentLosses, document_losses
from ncn.inference.evaluate import evaluate
from ncn.machine.compiling import compiled
from ncn.machine.files import disk_problem_in_one_line
from ncn.steering.documents import DocumentInputs
from ncn.training.distributed import Processes
from ncn.training.objective import Objective
from ncn.training.optimizers import (
    build_optimizers,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    update,
)
from ncn.training.run_folder import RunFolder


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
    model: LanguageModel
    device: torch.device
    autocast: torch.dtype | None
    document_inputs: DocumentInputs | None = None
    valid_inputs: DocumentInputs | None = None
    processes: Processes = field(default_factory=Processes)
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
        self.objective = Objective(self.model, self.config.loss_chunk)
        if self.config.compile:
            self.model.hidden_states = compiled(self.model.hidden_states)  # type: ignore[method-assign]

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the signals of its last micro-batch."""
        config = self.config
        batch = self.dataset.batch(config.seed, self.step, config.batch_size, self.context)
        loss_sum, homeostatic_sum, signals = self.differentiate(batch)
        factor = learning_rate_factor(config, self.step, self.total_steps)
        norm = update(self.optimizers, self.model.parameters(), config.clip, factor)
        if not math.isfinite(loss_sum + norm):
            raise self.not_a_number("loss or its gradient")
        self.step += 1
        self.batches_sha256 = batch.chained(self.batches_sha256)
        self.sums.loss += loss_sum
        self.sums.homeostatic += homeostatic_sum
        self.sums.grad_norm += norm
        self.sums.steps += 1
        return signals

    def differentiate(self, batch: Batch) -> tuple[float, float, dict[str, Tensor]]:
        """Add up the gradients of this process's rows of a step's batch, micro-batch by micro-batch.

        Returns its part of the loss in nats a token and of the homeostatic loss, and the last signals.
        """
        config, own = self.config, self.processes.rows(self.config.batch_size)
        count = int((batch.targets != IGNORED).sum())
        weight = config.homeostatic_weight
        if config.homeostatic_schedule == "annealed":
            weight *= 1 - self.step / self.total_steps
        loss_sum = homeostatic_sum = 0.0
        signals: dict[str, Tensor] = {}
        size = -(-(own.stop - own.start) // config.accumulation)
        control, shares = self._control()
        for first in range(own.start, own.stop, size):
            rows = slice(first, min(first + size, own.stop))
            inputs, targets = batch.inputs[rows].to(self.device), batch.targets[rows].to(self.device)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = self.objective(
                    inputs,
                    targets,
                    count=count,
                    share=len(inputs) / config.batch_size,
                    weight=weight,
                    control=None if control is None else control.of_rows(rows),
                    shares=None if shares is None else shares[rows],
                )
            loss.objective.backward()
            loss_sum += loss.nats.item() / count
            homeostatic_sum += loss.homeostatic.item()
            signals = loss.signals
        return loss_sum, homeostatic_sum, signals

    def _control(self) -> tuple[ControlInputs | None, Tensor | None]:
        """What this step's batch is given from outside, and how many times each of its targets counts."""
        config = self.config
        if self.document_inputs is None:
            return None, None
        batch = config.seed, self.step, config.batch_size, self.context
        control = self.document_inputs.batch(*batch, config.input_dropout, config.single_input_dropout)
        shares = self.document_inputs.shares(*batch, control)
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
        return document_losses(
            self.model, valid, context=self.context, autocast=self.autocast, document_inputs=self.valid_inputs
        )

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
