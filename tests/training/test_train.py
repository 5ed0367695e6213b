"""Training: what a step computes, and what a run leaves behind."""

import importlib.machinery
import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ncn.core.signals.table import homeostatic_loss
from ncn.data.dataset import TokenDataset
from ncn.errors import UserError
from ncn.inference.document_losses import DocumentLosses
from ncn.inference.evaluate import evaluate
from ncn.machine.stopping import Interrupted
from ncn.models.saved import load
from ncn.training.begin import begin, fit_to_data
from ncn.training.checkpoints import read_checkpoint
from ncn.training.run_folder import RunFolder
from ncn.training.session import Training
from tiny import STEPS, at_step, interrupt, recipe, run

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
    subprocess.run([sys.executable, "-m", "ncn", "train", *words, "--compile"], check=True)
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
