"""Training a model: one loop for every arm, baseline, static and local gates, and the controller."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ncn.config.recipe import Recipe
from ncn.machine.files import disk_problem_in_one_line, write_json
from ncn.machine.memory import keep_freed_memory
from ncn.machine.progress import TrainingProgress
from ncn.machine.stopping import Interrupted, graceful_stop
from ncn.models.saved import save_model
from ncn.training.begin import begin
from ncn.training.session import Accumulated, Training
from ncn.training.trackers import Tracker, open_trackers


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
    from ncn.pages.curves import loss_curve, published_curve

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
