"""Many runs: as many at once as there are cores or devices, here or on a Ray cluster, each in its own run folder.

Here, runs are trained by worker processes that this one starts and feeds through pipes. When it ends, however it ends,
the pipes close; a worker then saves its run and ends too.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset
from ncn.errors import UserError
from ncn.lab.worker import run_job
from ncn.machine.devices import usable_cores
from ncn.machine.progress import TokensProgress
from ncn.machine.stopping import Interrupted, graceful_stop
from ncn.training.begin import fit_to_data, identify
from ncn.training.run_folder import RunFolder

Launcher = Literal["local", "ray"]

_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """One run: train `recipe` on the dataset folder `data`, validate on `valid`, and leave the run folder `out`; it
    begins at the weights of the model in `start`, if there is one."""

    recipe: Recipe
    data: Path
    valid: Path
    out: Path
    start: Path | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, in whole steps."""
        train = self.recipe.train
        step = train.batch_size * (train.context or self.recipe.model.context_length)
        return math.ceil(train.tokens / step) * step

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that is finished, None for any other.

        Raises `UserError` where the folder holds a run by another recipe or on other data.
        """
        run = RunFolder(self.out)
        if not run.finished:
            return None
        data, valid = TokenDataset.open(self.data), TokenDataset.open(self.valid)
        run.check_unchanged(fit_to_data(self.recipe, data), identify(data, valid, self.start))
        return run.summary()

    def as_message(self) -> dict[str, Any]:
        paths = {name: str(getattr(self, name).absolute()) for name in ("data", "valid", "out")}
        start = str(self.start.absolute()) if self.start else None
        return {"recipe": self.recipe.model_dump(mode="json"), "start": start, **paths}


def launch(
    jobs: Sequence[Job],
    *,
    launcher: Launcher = "local",
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Do all runs, and return their summaries in the order of `jobs`.

    Finished runs are skipped, begun ones go on where they were. A run whose loss is no longer a number has the summary
    {"diverged": true, ...}.

    Args:
        launcher: "local", or "ray": the runs go to the Ray cluster that `ray.init` finds (or starts here), whose
            machines must share the folders of the jobs.
        workers: runs at once; by default one a device, or, on CPU, one a core. The workers share the cores.
        progress: show one bar over the tokens of all runs on standard error.
        say: is given the workers' warnings.

    Raises:
        UserError: a run cannot be done, or Ray is not installed. The other runs that were being done are saved.
        Interrupted: after Ctrl-C or SIGTERM, when every run being done is saved.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    outs = [job.out.absolute() for job in jobs]
    assert len(set(outs)) == len(outs), "two jobs with one folder"
    summaries: dict[Path, dict[str, Any]] = {}
    for job in jobs:
        summary = job.finished_summary()
        if summary is not None:
            summaries[job.out] = summary
    waiting = [job for job in jobs if job.out not in summaries]
    if waiting:
        watch = _Watch(jobs, set(summaries), progress)
        do = _launch_ray if launcher == "ray" else _launch_here
        with watch.bar:
            for job in do(waiting, workers, watch, say):
                watch.finished.add(job.out)
                summaries[job.out] = RunFolder(job.out).summary()
    return [summaries[job.out] for job in jobs]


def final_losses(summaries: Iterable[Mapping[str, Any]]) -> list[float | None]:
    """Validation losses at the end of runs, None for one that diverged."""
    return [None if summary.get("diverged") else summary["validation_loss"] for summary in summaries]


class _Watch:
    """How far all jobs are, from what their runs have logged."""

    def __init__(self, jobs: Sequence[Job], finished: set[Path], progress: bool) -> None:
        self.jobs, self.finished = jobs, finished
        self.bar = TokensProgress(sum(job.tokens for job in jobs), self.tokens(), progress)

    def tokens(self) -> int:
        return sum(job.tokens if job.out in self.finished else _logged_tokens(job.out) for job in self.jobs)

    def update(self) -> None:
        if self.bar.enabled:
            self.bar.update(self.tokens(), len(self.finished), len(self.jobs))


def _logged_tokens(out: Path) -> int:
    """Tokens after which a run's last line was logged; 0 before the first."""
    try:
        with (out / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    try:
        return int(json.loads(whole[-1])["tokens"]) if whole else 0
    except ValueError:  # a line longer than what was read
        return 0


class _Worker:
    """A process that trains one run after the other; it has a share of the cores, or a device."""

    def __init__(self, threads: int, device: str | None, heard: queue.Queue[tuple[_Worker, Any]]) -> None:
        self.job: Job | None = None
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        # In a session of its own: Ctrl-C is for this process alone, which then tells the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ncn.lab.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, text=True,
        )  # fmt: skip
        self.heard = heard
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self.heard.put((self, json.loads(line)))
        self.heard.put((self, None))

    def start(self, job: Job) -> None:
        assert self.process.stdin is not None
        self.job = job
        with suppress(BrokenPipeError):  # it died; `_listen` says so
            self.process.stdin.write(json.dumps(job.as_message()) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Tell it to save its run and end; does not wait."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def join(self) -> None:
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join()


def _launch_here(jobs: Sequence[Job], workers: int | None, watch: _Watch, say: Callable[[str], None]) -> Iterator[Job]:
    devices = _devices() if any(job.recipe.train.device.startswith(("auto", "cuda")) for job in jobs) else []
    count = min(workers or len(devices) or usable_cores(), len(jobs))
    threads = max(1, usable_cores() // count)
    heard: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
    waiting = list(reversed(jobs))
    with graceful_stop() as stopped, _workers(count, threads, devices, heard) as crew:
        for worker in crew:
            worker.start(waiting.pop())
        busy = len(crew)
        while busy:
            if stopped():
                raise Interrupted("stopped; every run that was being trained is saved")
            watch.update()
            try:
                worker, message = heard.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            job = worker.job
            if job is None:  # nothing left to do for it
                continue
            if message is None:
                raise UserError(
                    f"the process that trained {job.out} ended with status {worker.process.wait()}: was it out of "
                    "memory? give the same command again to go on, perhaps with fewer jobs at once"
                )
            if "say" in message:
                say(f"{job.out.parent.name}/{job.out.name}: {message['say']}")
            elif "error" in message:
                raise UserError(f"{job.out}: {message['error']}")
            else:
                yield job
                if waiting:
                    worker.start(waiting.pop())
                else:
                    worker.job, busy = None, busy - 1
        watch.update()


@contextmanager
def _workers(
    count: int, threads: int, devices: list[str], heard: queue.Queue[tuple[_Worker, Any]]
) -> Iterator[list[_Worker]]:
    crew: list[_Worker] = []
    try:
        for number in range(count):
            device = devices[number % len(devices)] if devices else None
            crew.append(_Worker(threads, device, heard))
        yield crew
    finally:
        for worker in crew:
            worker.stop()
        for worker in crew:
            worker.join()


def _devices() -> list[str]:
    """Names of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


def _launch_ray(jobs: Sequence[Job], workers: int | None, watch: _Watch, say: Callable[[str], None]) -> Iterator[Job]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise UserError("the launcher ray needs the package ray: pip install ray") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    on_device = ray.cluster_resources().get("GPU", 0) > 0 and all(
        job.recipe.train.device.startswith(("auto", "cuda")) for job in jobs
    )
    remote = ray.remote(num_cpus=1, num_gpus=1 if on_device else 0, max_retries=-1)(run_job)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}
    with graceful_stop() as stopped:
        try:
            while waiting or running:
                while waiting and (workers is None or len(running) < workers):
                    job = waiting.pop()
                    running[remote.remote(job.as_message())] = job
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                if stopped():
                    raise Interrupted("stopped; every run that was being trained is saved")
                watch.update()
                for reference in done:
                    job = running.pop(reference)
                    try:
                        warnings = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise UserError(f"{job.out}: {error.cause}") from None
                    for warning in warnings:
                        say(f"{job.out.parent.name}/{job.out.name}: {warning}")
                    yield job
        finally:
            for reference in running:
                ray.cancel(reference)  # as Ctrl-C: the run is saved
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_STOP_SECONDS)
