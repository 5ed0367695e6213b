"""Training: the same result whatever interrupts it, and one clear line for whatever cannot go on."""

import importlib.machinery
import importlib.util
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ncn.config import Recipe
from ncn.data import TokenDataset
from ncn.errors import UserError
from ncn.evaluate import DocumentLosses, evaluate
from ncn.fitting import fit_to_data
from ncn.runs import RunFolder, read_checkpoint
from ncn.signals import homeostatic_loss
from ncn.stopping import Interrupted
from ncn.store import load
from ncn.train import Training, begin, train
from tiny import STEPS, assert_nothing_half_written, assert_same_run, at_step, interrupt, prepare_text, recipe, stories

NCN = [sys.executable, "-m", "ncn"]


def run(recipe: Recipe, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    return train(recipe, data, out, progress=False, **options)


# Resumed = uninterrupted


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
    context.set_forkserver_preload(["ncn.train", "ncn.plot"])
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


# What a step computes


@pytest.mark.parametrize("accumulation", [1, 2, 3, 9])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(tmp_path: Path, data: Path, accumulation: int) -> None:
    training = begin(
        recipe(accumulation=accumulation, clip=1e9, batch_size=5, context=31),
        data, tmp_path / "run", valid=None, resume=False,
    )  # fmt: skip
    # the controller's gradients are zero at its neutral start
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # a batch in which some positions have no target, because an epoch ends there
    batches = ((step, training.dataset.batch(1, step, 5, 31)) for step in range(1000))
    training.step, batch = next((step, batch) for step, batch in batches if (batch.targets == -100).any())
    training.total_steps = 1000
    output = training.model(batch.inputs, output_signals=True)
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
    homeostatic = homeostatic_loss(output.signals)
    parameters = dict(training.model.named_parameters())
    expected = torch.autograd.grad(cross_entropy + 0.1 * homeostatic, list(parameters.values()))

    training.train_step()

    assert training.sums.loss == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert training.sums.homeostatic == pytest.approx(homeostatic.item(), rel=1e-5)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_trains_like_one_big_batch(tmp_path: Path, data: Path) -> None:
    results = {}
    for accumulation in (1, 4):
        run(recipe(accumulation=accumulation), data, tmp_path / f"{accumulation}")
        results[accumulation] = [line["loss"] for line in RunFolder.open(tmp_path / f"{accumulation}").metrics()]
    assert results[1] == pytest.approx(results[4], abs=2e-4)
    assert results[1][-1] < results[1][0] - 0.5


def test_gradients_are_clipped(tmp_path: Path, data: Path) -> None:
    training = begin(recipe(clip=0.01), data, tmp_path / "run", valid=None, resume=False)
    training.train_step()
    norm = torch.stack([p.grad.norm() for p in training.model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert training.sums.grad_norm > 0.1


def test_homeostasis_is_annealed_to_zero(tmp_path: Path, data: Path) -> None:
    """With a huge λ that falls to zero, the first steps' gradient is homeostatic and the last step's is not."""
    training = begin(
        recipe(homeostatic_weight=1e4, homeostatic_schedule="annealed", clip=1e9),
        data, tmp_path / "run", valid=None, resume=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in training.model.controller.parameters():
            parameter.add_(torch.randn_like(parameter))
    batch = training.dataset.batch(1, 0, 4, 32)
    training.dataset.batch = lambda *_: batch  # one and the same for every λ
    norms = []
    for step in (0, STEPS // 2, STEPS):  # the last would be after the end, where λ is zero
        training.step, training.sums.grad_norm = step, 0.0
        state = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        training.train_step()
        training.model.load_state_dict(state)
        training.model.zero_grad()
        norms.append(training.sums.grad_norm)
    assert norms[1] == pytest.approx(norms[0] / 2, rel=0.01)
    assert norms[2] < norms[0] / 100


def test_bfloat16_trains_nearly_as_float32(tmp_path: Path, data: Path, finished: Path) -> None:
    run(recipe(precision="bfloat16"), data, tmp_path / "run")
    exact, rounded = RunFolder.open(finished).summary(), RunFolder.open(tmp_path / "run").summary()
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], abs=0.05)
    assert RunFolder.open(tmp_path / "run").environment()["autocast"] == "torch.bfloat16"


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path: Path, data: Path, valid: Path, finished: Path) -> None:
    # in a process of its own, because the shape checks of the tests cannot be compiled
    (tmp_path / "recipe.json").write_text(recipe().model_dump_json())
    words = ["--config", tmp_path / "recipe.json", "--data", data, "--valid", valid, "--out", tmp_path / "run"]
    subprocess.run([*NCN, "train", *words, "--compile"], check=True)
    plain, compiled = RunFolder.open(finished).summary(), RunFolder.open(tmp_path / "run").summary()
    assert compiled["loss"] == pytest.approx(plain["loss"], abs=1e-2)
    assert compiled["validation_loss"] == pytest.approx(plain["validation_loss"], abs=1e-2)
    assert evaluate(load(tmp_path / "run")[0], TokenDataset.open(valid)).loss == pytest.approx(
        compiled["validation_loss"], abs=1e-4
    )


# What a run leaves behind


def test_the_saved_model_has_the_loss_of_the_summary(data: Path, valid: Path, finished: Path) -> None:
    summary = RunFolder.open(finished).summary()
    model, tokenizer = load(finished)
    assert tokenizer.fingerprint == TokenDataset.open(data).tokenizer().fingerprint
    result = evaluate(model, TokenDataset.open(valid))
    assert result.loss == summary["validation_loss"]
    assert result.bits_per_byte == summary["validation_bits_per_byte"]
    assert result.tokens == TokenDataset.open(valid).tokens - 1
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["steps"] == STEPS


def test_metrics_are_logged_when_asked_for_and_validated_when_asked_for(finished: Path) -> None:
    lines = RunFolder.open(finished).metrics()
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 15, 20]
    assert all(line["tokens"] == line["step"] * 4 * 32 for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert set(lines[0]["signals"]) == {"gain", "precision", "ffn_gate", "head_gate"}
    assert lines[-1]["signals"]["gain"]["spread"] > 0
    assert lines[-1]["controller_grad_norm"] > 0


def test_bits_per_byte_is_the_loss_by_the_bytes_of_the_text(data: Path, finished: Path) -> None:
    dataset = TokenDataset.open(data)
    for line in RunFolder.open(finished).metrics():
        expected = line["loss"] / math.log(2) * dataset.tokens / dataset.text_bytes
        assert line["bits_per_byte"] == pytest.approx(expected)


def test_a_baseline_logs_no_signals(tmp_path: Path, data: Path) -> None:
    run(recipe({"controller": None}, tokens=256), data, tmp_path / "run")
    (line,) = RunFolder.open(tmp_path / "run").metrics()
    assert "signals" not in line
    assert "homeostatic_loss" not in line


def test_the_curve_is_drawn(finished: Path) -> None:
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_environment_is_written_down(data: Path, valid: Path, finished: Path) -> None:
    environment = RunFolder.open(finished).environment()
    assert environment["torch"] == torch.__version__
    assert environment["data"] == TokenDataset.open(data).fingerprint
    assert environment["validation"] == TokenDataset.open(valid).fingerprint
    assert RunFolder.open(finished).recipe() == fit_to_data(recipe(), TokenDataset.open(data))


def test_tensorboard_gets_every_line(tmp_path: Path, data: Path, valid: Path, finished: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe(trackers=["tensorboard"]), data, tmp_path / "run", valid=valid)

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    lines = RunFolder.open(finished).metrics()
    logged = [(event.step, event.value) for event in board.Scalars("loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert board.Scalars("signals/gain/mean")[-1].value == pytest.approx(lines[-1]["signals"]["gain"]["mean"])
    assert board.Scalars("validation_loss")[-1].value == pytest.approx(lines[-1]["validation_loss"])


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_gives_the_command(tmp_path: Path, data: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"tracker {name} is not installed: pip install {name}"):
        run(recipe(trackers=[name]), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Service(types.ModuleType):
    """Stands for wandb or trackio: runs by what identifies them, each with the steps logged to it."""

    def __init__(self, name: str, key: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.key, self.runs, self.open = key, dict[str, list[int]](), ""

    def init(self, **given: Any) -> None:
        assert (given["project"], given["resume"]) == ("ncn", "allow")
        assert given["config"]["train"]["trackers"] == [self.__name__]
        assert given["name"].startswith("run")
        self.open = given[self.key]
        self.runs.setdefault(self.open, [])

    def log(self, values: dict[str, Any], step: int) -> None:
        self.runs[self.open].append(step)

    def finish(self) -> None:
        self.open = ""


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_in_its_service_and_another_folder_is_another_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    service = Service(name, key)
    monkeypatch.setitem(sys.modules, name, service)
    tracked, folder = recipe(trackers=[name]), tmp_path / "one" / "run"
    at_step(monkeypatch, {STEPS // 2: interrupt})
    with pytest.raises(Interrupted):
        run(tracked, data, folder)
    run(tracked, data, folder, resume=True)
    assert service.open == ""
    (steps,) = service.runs.values()
    assert steps == [*(line["step"] for line in RunFolder.open(folder).metrics()), STEPS]
    run(tracked, data, tmp_path / "other" / "run")
    assert len(service.runs) == 2


# Warnings


def test_a_stuck_controller_is_mentioned_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    chosen = recipe(controller_learning_rate=1e-9, log_every=1)
    at_step(monkeypatch, {12: interrupt})
    with pytest.raises(Interrupted):
        run(chosen, data, tmp_path / "run", say=said.append)
    run(chosen, data, tmp_path / "run", say=said.append, resume=True)
    assert said == ["warning at step 3: the controller is stuck: no signal varies over tokens by more than 0.0001"]


def test_a_saturated_signal_is_mentioned_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saturate(training: Training) -> None:
        with torch.no_grad():
            training.model.controller.networks["0"].output.bias.fill_(20)

    said: list[str] = []
    at_step(monkeypatch, {0: saturate})
    run(recipe(log_every=1), data, tmp_path / "run", say=said.append)
    assert said == ["warning at step 3: in one layer, signal gain sits at a bound of its range for 100% of its values"]


def test_a_healthy_run_says_nothing(tmp_path: Path, data: Path) -> None:
    said: list[str] = []
    run(recipe(), data, tmp_path / "run", say=said.append)
    assert said == []


# What cannot go on


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def finite(run: Path) -> bool:
    tensors = read_checkpoint(RunFolder.open(run).checkpoints()[0]).tensors
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_learning_rate_that_explodes_ends_in_one_line(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"no longer a number at step .*lower learning rate") as error:
        run(recipe(learning_rate=1e30, checkpoint_every=1), data, tmp_path / "run")
    assert "checkpoint stays in" in one_line(error)
    assert finite(tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_never_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def poison(training: Training) -> None:
        with torch.no_grad():
            training.model.layers[0].ffn.up.weight[0, 0] = value

    at_step(monkeypatch, {6: poison})
    with pytest.raises(UserError, match=r"no longer a number at step 6: the last good checkpoint stays in") as error:
        run(recipe(), data, tmp_path / "run")
    one_line(error)
    assert RunFolder.open(tmp_path / "run").checkpoints()[0].name == "step-00000004.safetensors"
    assert finite(tmp_path / "run")


def test_the_first_step_may_fail_without_a_checkpoint_to_praise(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(training: Training) -> None:
        with torch.no_grad():
            training.model.embedding.weight.fill_(math.nan)

    at_step(monkeypatch, {0: poison})
    with pytest.raises(UserError, match="at step 0: start a new run with a lower learning rate"):
        run(recipe(), data, tmp_path / "run")


def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(
    tmp_path: Path, data: Path, valid: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No file may grow beyond 8 KiB: what a full disk does to a save, without a disk to fill.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, {6: lambda training: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))})
    try:
        with pytest.raises(UserError, match="what was saved before is intact: free some space") as error:
            run(recipe(), data, tmp_path / "run", valid=valid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error)
    assert [path.name for path in RunFolder.open(tmp_path / "run").checkpoints()] == ["step-00000004.safetensors"]
    assert_nothing_half_written(tmp_path / "run")

    run(recipe(), data, tmp_path / "run", valid=valid, resume=True)
    assert_same_run(finished, tmp_path / "run")


def stopped_run(folder: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch, step: int = 9) -> Path:
    with monkeypatch.context() as patch:
        at_step(patch, {step: interrupt})
        with pytest.raises(Interrupted):
            run(recipe(), data, folder / "run", valid=valid)
    return folder / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(1000))


def replace_by_a_foreign_file(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, overwrite, replace_by_a_foreign_file])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, data: Path, valid: Path, finished: Path, monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:  # fmt: skip
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    newest, before = RunFolder.open(out).checkpoints()
    assert (newest.name, before.name) == ("step-00000010.safetensors", "step-00000008.safetensors")
    damage(newest)
    said: list[str] = []

    run(recipe(), data, out, valid=valid, resume=True, say=said.append)

    (line,) = said
    assert str(newest) in line
    assert_same_run(finished, out)


def test_nothing_readable_left_is_said(
    tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    for path in RunFolder.open(out).checkpoints():
        truncate(path)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read; start the run anew"):
        run(recipe(), data, out, valid=valid, resume=True)


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    newest = RunFolder.open(out).checkpoints()[0]
    other = tmp_path / "other"
    run(recipe({"d_model": 32}), data, other)
    shutil.copy(RunFolder.open(other).checkpoints()[0], newest.with_name("step-00000011.safetensors"))
    with pytest.raises(UserError, match="of another model; remove it"):
        run(recipe(), data, out, valid=valid, resume=True)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({}, {"learning_rate": 0.02}, "train.learning_rate was 0.01 and is now 0.02"),
        ({"num_layers": 3}, {}, "model.num_layers was 2 and is now 3"),
        ({"controller": None}, {}, "model.controller"),
        ({}, {"tokens": 10_000}, "train.tokens was 2560 and is now 10000"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(
    tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any], changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    with pytest.raises(UserError, match="the recipe has changed since the run began") as error:
        run(recipe(model, **changes), data, out, valid=valid, resume=True)
    assert message in one_line(error)


def test_what_does_not_change_the_result_may_change(
    tmp_path: Path, data: Path, valid: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    run(recipe(checkpoint_every=3, device="cpu"), data, out, valid=valid, resume=True)
    assert_same_run(finished, out)


def test_changed_data_is_refused(tmp_path: Path, data: Path, valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    other = prepare_text(tmp_path / "other", stories(30_000, 40_000), tokenizer=str(data)).folder
    with pytest.raises(UserError, match=r"the training data is not that of the run in .*; give the same --data"):
        run(recipe(), other, out, valid=valid, resume=True)
    with pytest.raises(UserError, match=r"the validation data is not that of the run in .*; give the same --valid"):
        run(recipe(), data, out, resume=True)


def test_a_moved_dataset_is_the_same_data(
    tmp_path: Path, data: Path, valid: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_run(tmp_path, data, valid, monkeypatch)
    shutil.copytree(data, tmp_path / "moved")
    run(recipe(), tmp_path / "moved", out, valid=valid, resume=True)
    assert_same_run(finished, out)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, data: Path, finished: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to.txt").write_text("dear")
    with pytest.raises(UserError, match="letters already exists and is not empty; choose another --out"):
        run(recipe(), data, tmp_path / "letters")
    with pytest.raises(UserError, match="already exists and is not empty; add --resume to continue it"):
        run(recipe(), data, finished)
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to.txt"]


def test_mistakes_leave_no_folder_behind(tmp_path: Path, data: Path) -> None:
    other = prepare_text(tmp_path / "other", stories(0, 5_000), vocab_size=280).folder
    mistakes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        "context .64. is longer than the model's": (recipe(context=64), {}),
        "less than one window of 100000": (recipe({"context_length": 100_000}), {}),
        "no device 'tpu' here": (recipe(device="tpu"), {}),
        "holds no prepared data": (recipe(), {"valid": tmp_path}),
        "prepared with different tokenizers": (recipe(), {"valid": other}),
    }
    for message, (chosen, options) in mistakes.items():
        with pytest.raises(UserError, match=message) as error:
            run(chosen, data, tmp_path / "run", **options)
        one_line(error)
        assert not (tmp_path / "run").exists()


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory; choose a folder"):
        run(recipe(), data, tmp_path / "file" / "run")


def test_weights_of_the_saved_model_are_those_of_the_last_checkpoint(finished: Path) -> None:
    saved = load_file(finished / "model" / "model.safetensors")
    tensors = read_checkpoint(RunFolder.open(finished).checkpoints()[0]).tensors
    assert all(torch.equal(tensor, tensors[f"model.{name}"]) for name, tensor in saved.items())
    assert json.loads((finished / "config.json").read_text())["model"]["d_model"] == 16


def test_a_run_leaves_the_loss_of_every_validation_document(finished: Path, valid: Path) -> None:
    summary, documents = RunFolder.open(finished).summary(), DocumentLosses.load(finished / "documents.safetensors")
    assert len(documents.nats) == TokenDataset.open(valid).documents
    assert documents.loss == summary["validation_loss"]
    assert documents.bits_per_byte == summary["validation_bits_per_byte"]


def test_other_initial_weights_on_the_same_batches(tmp_path: Path, data: Path, finished: Path) -> None:
    for name, seeds in (("twin", {"init_seed": 7}), ("same", {"init_seed": 1}), ("other", {"seed": 7})):
        run(recipe(**seeds), data, tmp_path / name)
    found = {name: RunFolder.open(tmp_path / name).summary() for name in ("twin", "same", "other")}
    expected = RunFolder.open(finished).summary()
    assert found["twin"]["batches_sha256"] == found["same"]["batches_sha256"] == expected["batches_sha256"]
    assert found["other"]["batches_sha256"] != expected["batches_sha256"]
    assert found["same"]["loss"] == expected["loss"] != found["twin"]["loss"]
