"""Many runs at once: each as if it had been trained alone, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.lab.fleet import Job, launch
from ncn.machine.stopping import Interrupted
from ncn.training.run_folder import RunFolder
from ncn.training.train import train
from tiny import assert_nothing_half_written, assert_same_run, recipe

STEPS = 90
LONG: dict[str, Any] = {"tokens": STEPS * 128, "log_every": 1, "eval_every": 40, "checkpoint_every": 1000}


def jobs_in(folder: Path, data: Path, valid: Path) -> list[Job]:
    return [Job(recipe(seed=seed, **LONG), data, valid, folder / f"seed-{seed}") for seed in (1, 2, 3)]


def run_all(jobs: list[Job], **options: Any) -> list[dict[str, Any]]:
    return launch(jobs, **({"workers": 2, "progress": False} | options))


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path, valid: Path) -> list[Job]:
    """The runs, trained one after the other in this process."""
    jobs = jobs_in(tmp_path_factory.mktemp("alone"), data, valid)
    for job in jobs:
        train(job.recipe, job.data, job.out, valid=job.valid, progress=False)
    return jobs


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").is_dir(), reason="finds the workers in /proc")
def test_killed_and_continued_is_as_if_nothing_had_happened(
    alone: list[Job], tmp_path: Path, data: Path, valid: Path
) -> None:
    jobs = jobs_in(tmp_path, data, valid)
    messages = json.dumps([job.as_message() for job in jobs])
    program = (
        "import json, sys; from pathlib import Path; from ncn.config import Recipe\n"
        "from ncn.lab.fleet import Job, launch\n"
        "launch([Job(Recipe.parse(m['recipe']), *(Path(m[k]) for k in ('data', 'valid', 'out')))"
        " for m in json.loads(sys.argv[1])], workers=2, progress=False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, messages])
    begun = [job.out / "metrics.jsonl" for job in jobs[:2]]
    wait_for(lambda: any(path.is_file() and path.read_text().count("\n") > 5 for path in begun))
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.kill()  # nothing can be tidied up after SIGKILL
    parent.wait()
    wait_for(lambda: not any(alive(worker) for worker in workers))
    runs = [RunFolder(job.out) for job in jobs]
    assert not any(run.finished for run in runs)
    saved = [path.name for run in runs[:2] for path in run.checkpoints()]
    assert any("step-00000000" < name < f"step-{STEPS:08d}" for name in saved)
    assert not jobs[2].out.exists()

    summaries = run_all(jobs)
    for job, other, summary in zip(jobs, alone, summaries, strict=True):
        assert_same_run(job.out, other.out)
        assert_nothing_half_written(job.out)
        assert summary == RunFolder(job.out).summary()
    times = [(job.out / "summary.json").stat().st_mtime_ns for job in jobs]
    assert run_all(jobs) == summaries  # and nothing is done twice
    assert [(job.out / "summary.json").stat().st_mtime_ns for job in jobs] == times


def test_ctrl_c_saves_every_run(tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_in(tmp_path, data, valid)

    def interrupt_when_begun(watch: Any) -> None:
        if all((job.out / "metrics.jsonl").is_file() for job in jobs[:2]):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ncn.lab.fleet._Watch.update", interrupt_when_begun)
    monkeypatch.setattr("ncn.lab.fleet._POLL_SECONDS", 0.02)
    with pytest.raises(Interrupted, match="every run that was being trained is saved"):
        run_all(jobs)
    for job in jobs[:2]:
        run = RunFolder(job.out)
        assert run.finished or run.checkpoints()
    assert not jobs[2].out.exists()


def test_a_diverged_run_is_finished_and_says_so(tmp_path: Path, data: Path, valid: Path) -> None:
    broken = Job(recipe(learning_rate=1e30, warmup=0.0), data, valid, tmp_path / "broken")
    sound = Job(recipe(tokens=128), data, valid, tmp_path / "sound")
    said: list[str] = []
    first, second = run_all([broken, sound], say=said.append)
    assert first["diverged"] is True
    assert second["steps"] == 1
    assert any("broken" in line and "no longer a number" in line for line in said)
    assert run_all([broken])[0] == first


def test_a_mistake_is_the_users_and_names_the_run(tmp_path: Path, data: Path, valid: Path) -> None:
    with pytest.raises(UserError, match=r"run: no device 'tpu' here"):
        run_all([Job(recipe(device="tpu"), data, valid, tmp_path / "run")])


def test_a_finished_run_of_another_recipe_is_refused(alone: list[Job], data: Path, valid: Path) -> None:
    with pytest.raises(UserError, match=r"train\.clip was 1\.0 and is now 2\.0"):
        run_all([Job(recipe(seed=1, **LONG, clip=2.0), data, valid, alone[0].out)])


def test_no_workers_are_too_few() -> None:
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        run_all([], workers=0)


def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install ray"):
        run_all([Job(recipe(), data, valid, tmp_path / "run")], launcher="ray")


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on cores that do other work too
@pytest.mark.filterwarnings("ignore")
def test_ray_does_the_same(alone: list[Job], tmp_path: Path, data: Path, valid: Path) -> None:
    ray = pytest.importorskip("ray")
    broken = Job(Recipe.parse(recipe(learning_rate=1e30).model_dump()), data, valid, tmp_path / "broken")
    jobs = jobs_in(tmp_path, data, valid)
    try:
        summaries = run_all([*jobs, broken], launcher="ray")
    finally:
        ray.shutdown()
    for job, other in zip(jobs, alone, strict=True):
        assert_same_run(job.out, other.out)
    assert summaries[-1]["diverged"] is True
