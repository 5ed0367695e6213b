"""Training: the same result whatever interrupts it."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.machine.stopping import Interrupted
from ncn.training.run_folder import RunFolder
from ncn.training.session import Training
from ncn.training.train import train
from tiny import STEPS, assert_nothing_half_written, assert_same_run, at_step, interrupt, recipe, run

NCN = [sys.executable, "-m", "ncn"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "accumulation": 3},
        {"homeostatic_schedule": "annealed", "homeostatic_weight": 0.5, "schedule": "linear"},
        {"precision": "bfloat16"},
    ],
    ids=["adamw", "muon, accumulation", "annealed homeostasis", "bfloat16"],
)
def test_a_run_that_is_stopped_often_gives_the_uninterrupted_result(
    tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    chosen = recipe(**changes)
    run(chosen, data, tmp_path / "whole", valid=valid)

    # on no border, on a border of logging, of checkpoints and of validations, at the last step but one and at the last
    stops = [0, 1, 2, 3, 9, 14, STEPS - 2, STEPS - 1]
    at_step(monkeypatch, dict.fromkeys(stops, interrupt))
    out = tmp_path / "stopped"
    for stop in stops[:-1]:
        with pytest.raises(Interrupted, match=f"stopped at step {stop + 1} of {STEPS}, saved in"):
            run(chosen, data, out, valid=valid, resume=True)
        with pytest.raises(UserError, match="has not finished; continue it with --resume"):
            RunFolder.open(out).summary()
    run(chosen, data, out, valid=valid, resume=True)

    assert_same_run(tmp_path / "whole", out)


def test_sigterm_saves_as_ctrl_c_does(
    tmp_path: Path, data: Path, finished: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, {6: lambda training: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        run(recipe(), data, tmp_path / "run", valid=valid)
    assert RunFolder.open(tmp_path / "run").checkpoints()[0].name == "step-00000007.safetensors"

    run(recipe(), data, tmp_path / "run", valid=valid, resume=True)

    assert_same_run(finished, tmp_path / "run")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(training: Training) -> None:
        interrupt(training)
        interrupt(training)

    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, {6: twice})
    with pytest.raises(KeyboardInterrupt) as stop:
        run(recipe(), data, tmp_path / "run")

    assert not isinstance(stop.value, Interrupted)
    assert RunFolder.open(tmp_path / "run").checkpoints()[0].name == "step-00000004.safetensors"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_ended_after_its_last_checkpoint_only_finishes(
    tmp_path: Path, data: Path, valid: Path, finished: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    (out / "loss.png").unlink()

    run(recipe(), data, out, valid=valid, resume=True)

    assert_same_run(finished, out)
    assert (out / "loss.png").is_file()


def test_a_finished_run_is_not_trained_again(data: Path, valid: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    said: list[str] = []

    summary = run(recipe(), data, finished, valid=valid, resume=True, say=said.append)

    assert summary == RunFolder.open(finished).summary()
    assert said == [f"{finished} is finished already"]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resuming_what_never_began_begins(tmp_path: Path, data: Path, valid: Path, finished: Path) -> None:
    run(recipe(), data, tmp_path / "new", valid=valid, resume=True)
    assert_same_run(finished, tmp_path / "new")

    killed = tmp_path / "killed while its folder was made"
    killed.mkdir()
    shutil.copy(finished / "env.json", killed)
    (killed / "config.json.part").write_text("{")
    run(recipe(), data, killed, valid=valid)
    assert_same_run(finished, killed)


def test_ctrl_c_on_the_command_line_says_how_to_go_on(tmp_path: Path, data: Path, valid: Path) -> None:
    chosen = tmp_path / "recipe.json"
    chosen.write_text(recipe(tokens=60 * 128, log_every=1).model_dump_json())
    out = tmp_path / "run"
    command = [*NCN, "train", "--config", chosen, "--data", data, "--valid", valid, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()

    assert process.returncode == 130
    assert printed == ""
    assert len(errors.splitlines()) == 1
    assert errors.startswith("stopped at step ")
    assert "--resume" in errors
    # resumed without naming the recipe again: the run knows it
    resumed = subprocess.run(
        [*NCN, "train", "--data", data, "--valid", valid, "--out", out, "--resume"], capture_output=True, text=True
    )
    assert (resumed.returncode, resumed.stderr.count("Traceback")) == (0, 0)
    run(Recipe.read(chosen), data, tmp_path / "whole", valid=valid)
    assert_same_run(tmp_path / "whole", out)


def half_written(out: Path) -> bool:
    """Whether a checkpoint is being written, or was when its writer was killed."""
    return any(not path.name.startswith("step-") or path.suffix == ".part" for path in (out / "checkpoints").glob("*"))


def kill_and_resume(chosen: Recipe, data: Path, out: Path, kills: int) -> int:
    """Start, kill -9, start again, and so on; then let it finish. Gives how many kills came during a save.

    Every other kill comes at a random moment, the rest as soon as a save is seen to have begun.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ncn.train", "ncn.pages.curves"])
    times = random.Random(7)
    during_save = 0
    for attempt in range(kills + 1):
        process = context.Process(target=train, args=(chosen, data, out), kwargs={"resume": True, "progress": False})
        process.start()
        if attempt < kills:
            process.join(times.uniform(0, 0.6))
            while attempt % 2 and process.is_alive() and not half_written(out):
                pass
            process.kill()
        process.join()
        during_save += half_written(out)
        assert process.exitcode in ({0, -signal.SIGKILL} if attempt < kills else {0})
        process.close()
    return during_save


def test_kill_at_any_moment_gives_the_uninterrupted_result(tmp_path: Path, data: Path) -> None:
    chosen = recipe(tokens=200 * 128, log_every=2, checkpoint_every=1)
    run(chosen, data, tmp_path / "whole")

    during_save = kill_and_resume(chosen, data, tmp_path / "killed", kills=8)

    assert during_save > 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_half_written(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_hundred_kills(tmp_path: Path, data: Path, optimizer: str) -> None:
    chosen = recipe({"d_model": 64}, tokens=4000 * 128, optimizer=optimizer, log_every=2, checkpoint_every=1)
    run(chosen, data, tmp_path / "whole")

    during_save = kill_and_resume(chosen, data, tmp_path / "killed", kills=100)

    assert during_save > 10
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_nothing_half_written(tmp_path / "killed")
