"""One training loop for every arm: baseline, static and local gates, and the controller."""

from __future__ import annotations

import math
import signal as process_signals
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncn.config import Recipe, TrainConfig
from ncn.data import TokenDataset
from ncn.errors import UserError
from ncn.evaluate import check_vocabulary, evaluate
from ncn.loss import IGNORED
from ncn.model import ModulatedTransformer
from ncn.optimizers import build_optimizers, learning_rate_factor, load_optimizer_state, optimizer_state
from ncn.progress import TrainingProgress
from ncn.runs import RunFolder, describe_environment, write_json
from ncn.signals import controller_problem, homeostatic_loss, signal_statistics
from ncn.store import save_model
from ncn.trackers import Tracker, open_trackers


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM after its state was saved."""


@dataclass
class Accumulated:
    """Sums since the last logged line. They travel in the checkpoint, so that a resumed run logs the same lines."""

    loss: float = 0.0
    homeostatic: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0


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
    step: int = 0
    sums: Accumulated = field(default_factory=Accumulated)
    warned: bool = False

    def __post_init__(self) -> None:
        self.config: TrainConfig = self.recipe.train
        self.context = self.config.context or self.recipe.model.context_length
        self.tokens_per_step = self.config.batch_size * self.context
        self.total_steps = math.ceil(self.config.tokens / self.tokens_per_step)
        self.optimizers = build_optimizers(self.model, self.config)
        self.loss = self.model.loss
        if self.config.compile:
            self.model.hidden_states = torch.compile(self.model.hidden_states)  # type: ignore[method-assign]

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
        for inputs, targets in zip(batch.inputs.split(size), batch.targets.split(size), strict=True):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                nats, signals = self.loss(inputs.to(self.device), targets.to(self.device), chunk=self.config.loss_chunk)
                objective = nats / count
                share = len(inputs) / self.config.batch_size
                homeostatic = homeostatic_loss(signals) * share if signals else objective.new_zeros(())
                if weight:
                    objective = objective + weight * homeostatic
            objective.backward()  # type: ignore[no-untyped-call]
            loss_sum += nats.item() / count
            homeostatic_sum += homeostatic.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        self.step += 1
        self.sums.loss += loss_sum
        self.sums.homeostatic += homeostatic_sum
        self.sums.grad_norm += norm.item()
        self.sums.steps += 1
        return signals

    def check_finite(self) -> None:
        """Raises `UserError` when the loss or the gradient has become infinite or not a number."""
        if not math.isfinite(self.sums.loss + self.sums.grad_norm):
            raise UserError(
                f"the loss or its gradient is no longer a number at step {self.step}; "
                f"the last good checkpoint is kept in {self.run.path / 'checkpoints'}: start a new run with a lower "
                "learning_rate or a longer warmup"
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

    def bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) * self.dataset.tokens / self.dataset.text_bytes

    def validate(self, max_tokens: int | None) -> dict[str, float]:
        """Validation loss; empty without validation data."""
        if self.valid is None:
            return {}
        result = evaluate(self.model, self.valid, context=self.context, max_tokens=max_tokens, autocast=self.autocast)
        return {
            "validation_loss": result.loss,
            "validation_perplexity": result.perplexity,
            "validation_bits_per_byte": result.bits_per_byte,
        }

    def save(self, seconds: float) -> Path:
        """Write a checkpoint of everything that the next step depends on."""
        self.check_finite()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= optimizer_state(self.model, self.optimizers)
        facts = {
            "step": self.step,
            "sums": vars(self.sums),
            "seconds": seconds,
            "data": self.dataset.fingerprint,
            "autocast": str(self.autocast),
            "warned": self.warned,
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
            raise UserError(
                f"the data in {self.dataset.folder} is not the data that {self.run.path} was trained on; "
                "give the same --data to resume"
            )
        if facts["autocast"] != str(self.autocast):
            warn(
                f"the run used {facts['autocast']} until now and goes on with {self.autocast}: not bit for bit the same"
            )
        weights = {
            name.removeprefix("model."): t for name, t in checkpoint.tensors.items() if name.startswith("model.")
        }
        self.model.load_state_dict(weights)
        load_optimizer_state(self.model, self.optimizers, checkpoint.tensors)
        self.step, self.sums, self.warned = facts["step"], Accumulated(**facts["sums"]), facts["warned"]
        self.run.truncate_metrics(self.step)
        return float(facts["seconds"])


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a model by `recipe` on prepared `data` and leave a run folder at `out`; returns its summary.

    The model's vocabulary and separator are taken from the data. With `resume`, an interrupted run continues bit for
    bit (on CPU); a finished one returns its summary. Raises `UserError` for unusable data or folders, a changed recipe
    or changed data on resume, a full disk, and a loss that is no longer a number; `Interrupted` after Ctrl-C.
    """
    training = begin(recipe, data, out, valid=valid, resume=resume, say=say)
    if training.run.finished:
        say(f"{training.run.path} is finished already")
        return training.run.summary()
    seconds = training.restore(say) if resume else 0.0
    with open_trackers(recipe.train.trackers, training.run) as tracker, graceful_stop() as stopped:
        return _loop(training, seconds, tracker, stopped, progress, say)


def begin(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None,
    resume: bool,
    say: Callable[[str], None],
) -> Training:
    """Open the data, create or reopen the run folder, and build the model at its initial weights."""
    dataset = TokenDataset.open(data)
    valid_set = TokenDataset.open(valid) if valid else None
    recipe = fit_to_data(recipe, dataset)
    tokenizer = dataset.tokenizer()
    device = _device(recipe.train.device)
    autocast = arithmetic(recipe.train.precision, device)
    if resume and (Path(out) / "config.json").exists():
        run = RunFolder.open(out)
        _check_unchanged(run.recipe(), recipe)
        if run.environment().get("data") != dataset.fingerprint:
            raise UserError(
                f"the data in {dataset.folder} is not the data of {run.path}; give the same --data to resume"
            )
    else:
        environment = describe_environment(
            device,
            data=dataset.fingerprint,
            validation=valid_set.fingerprint if valid_set else None,
            autocast=str(autocast),
        )
        run = RunFolder.create(out, recipe, environment)
    torch.manual_seed(recipe.train.seed)
    model = ModulatedTransformer(recipe.model).to(device)
    check_vocabulary(model, dataset)
    if valid_set:
        check_vocabulary(model, valid_set)
    tokenizer.save(run.path)
    training = Training(recipe, run, dataset, valid_set, model, device, autocast)
    if dataset.tokens < training.context:
        raise UserError(
            f"the data has {dataset.tokens} tokens, less than one window of {training.context}; "
            "prepare more text, or lower context"
        )
    return training


def fit_to_data(recipe: Recipe, dataset: TokenDataset) -> Recipe:
    """The recipe with the vocabulary size and the separator of the data."""
    model = recipe.model.override(vocab_size=dataset.vocab_size, separator_id=dataset.separator_id)
    context = recipe.train.context or model.context_length
    if context > model.context_length:
        raise UserError(
            f"train.context ({context}) is longer than the model's context_length ({model.context_length}); "
            "raise context_length"
        )
    return Recipe(model=model, train=recipe.train)


def _loop(
    training: Training,
    seconds: float,
    tracker: Tracker,
    stopped: Callable[[], bool],
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    config, run = training.config, training.run
    begun, logged_at, logged_step = time.monotonic() - seconds, time.monotonic(), training.step
    best: dict[str, float] = {}
    with TrainingProgress(training.total_steps, training.tokens_per_step, training.step, progress) as bar:
        while training.step < training.total_steps:
            signals = training.train_step()
            last = training.step == training.total_steps
            if training.step % config.log_every == 0 or last:
                training.check_finite()
                now = time.monotonic()
                speed = (training.step - logged_step) * training.tokens_per_step / (now - logged_at)
                line = training.line(signals, speed, now - begun)
                if training.step % config.eval_every == 0 and not last:
                    line |= training.validate(config.eval_tokens)
                if training.recipe.model.controller and not training.warned:
                    problem = controller_problem(training.recipe.model.controller, line["signals"])
                    if problem and training.step > training.total_steps // 10:
                        training.warned = True
                        say(f"warning at step {training.step}: {problem}")
                if not last:
                    run.append_metrics(line)
                    tracker.log(line)
                training.sums = Accumulated()
                logged_at, logged_step = time.monotonic(), training.step
                bar.update(training.step, line)
            else:
                bar.update(training.step, None)
            for optimizer in training.optimizers:
                optimizer.zero_grad()
            if stopped():
                training.save(time.monotonic() - begun)
                raise Interrupted(f"stopped at step {training.step} of {training.total_steps}; continue with --resume")
            if training.step % config.checkpoint_every == 0 or last:
                training.save(time.monotonic() - begun)
        best = training.validate(None)
        line |= best
        run.append_metrics(line)
        tracker.log(line)
    return _finish(training, line, time.monotonic() - begun)


def _finish(training: Training, line: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Save the trained model, draw the curve, and, last of all, write the summary that says "finished"."""
    from ncn.plot import loss_curve, published_curve

    run = training.run
    save_model(training.model, run.model_folder, training.dataset.tokenizer())
    gpt2 = training.recipe.model.vocab_size == 50257
    loss_curve(run.metrics(), run.path / "loss.png", published=published_curve() if gpt2 else None)
    summary = {
        "steps": training.total_steps,
        "tokens": training.total_steps * training.tokens_per_step,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "loss": line["loss"],
        **{key: value for key, value in line.items() if key.startswith("validation_")},
        "seconds": seconds,
        "tokens_per_second": training.total_steps * training.tokens_per_step / seconds,
    }
    write_json(run.path / "summary.json", summary)
    return summary


def arithmetic(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products are computed in under autocast, None for float32."""
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    fast = (
        getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    )
    return torch.bfloat16 if fast else None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} here; use device=cpu or device=auto") from None
    return device


# What may differ between a run and its continuation: nothing that changes the result.
_FREE = ("device", "trackers", "checkpoint_every")


def _check_unchanged(old: Recipe, new: Recipe) -> None:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for name in before.keys() | after.keys():
        if name.split(".")[-1] not in _FREE and before.get(name) != after.get(name):
            raise UserError(
                f"the recipe has changed since the run began: {name} was {before.get(name)!r} and is now "
                f"{after.get(name)!r}; resume with the old one, or start a new run"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is looked at between steps; a second one stops at once."""
    received: list[int] = []
    kinds = (process_signals.SIGINT, process_signals.SIGTERM)

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {kind: process_signals.signal(kind, note) for kind in kinds}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for kind, handler in previous.items():
            process_signals.signal(kind, handler)
