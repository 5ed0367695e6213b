"""What an earlier version left on disk is still read, computes what it computed, and goes on where it stopped.

The files are those of `tests/fixtures/version-0.1`, whose `make.py` says what they are. Numbers are the recorded ones
bit for bit where they were made: by the same torch on the same kind of processor with as many threads. Elsewhere they
are as close as other roundings allow.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ncn
from ncn.generate import generate
from ncn.machine.environment import describe_environment
from ncn.machine.files import flat
from ncn.train import train
from ncn.training import session
from ncn.training.run_folder import RunFolder
from tiny import without_times

STORED = Path(__file__).parents[1] / "fixtures" / "version-0.1"
FACTS = json.loads((STORED / "recorded.json").read_text("utf-8"))
RECORDED = load_file(STORED / "recorded.safetensors")


def tolerance() -> float:
    """Largest relative difference between today's numbers and the stored ones."""
    here = describe_environment(torch.device("cpu")) | {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    there = RunFolder.open(STORED / "finished").environment() | {"cpu_capability": FACTS["cpu_capability"]}
    same = all(here[name] == there[name] for name in ("torch", "device", "cpu_capability", "threads"))
    return 0.0 if same else 1e-5


def assert_same_numbers(found: torch.Tensor, stored: torch.Tensor) -> None:
    """Relative to the largest number: a small one may be the difference of large ones."""
    torch.testing.assert_close(found, stored, rtol=0.0, atol=tolerance() * float(stored.abs().max()))


def assert_same_losses(run: RunFolder) -> None:
    """Every line of the log, and the summary."""
    stored = RunFolder.open(STORED / "finished")
    lines, expected = [*run.metrics(), run.summary()], [*stored.metrics(), stored.summary()]
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        close = {name: approximately(value) for name, value in flat(without_times(other)).items()}
        assert flat(without_times(line)) == close


def approximately(value: Any) -> Any:
    """What equals `value`, and if it is a number, what is as close as `tolerance` says."""
    return value if isinstance(value, str) else pytest.approx(value, rel=tolerance(), abs=0.0)


def assert_same_weights(run: RunFolder) -> None:
    weights, stored = (
        load_file(model / "model.safetensors") for model in (run.model_folder, STORED / "finished" / "model")
    )
    assert weights.keys() == stored.keys()
    for name, tensor in weights.items():
        assert_same_numbers(tensor, stored[name])


def resumed(folder: Path) -> RunFolder:
    """A copy of the interrupted run, trained to its end."""
    run = RunFolder(shutil.copytree(STORED / "interrupted", folder / "run"))
    train(run.recipe(), STORED / "data", run.path, valid=STORED / "valid", resume=True, progress=False)
    return run


def test_an_interrupted_run_goes_on_to_the_stored_end(tmp_path: Path) -> None:
    stopped = RunFolder.open(STORED / "interrupted")
    assert not stopped.finished
    assert len(stopped.metrics()) < len(RunFolder.open(STORED / "finished").metrics())
    run = resumed(tmp_path)
    assert_same_losses(run)
    assert_same_weights(run)
    losses, stored = (load_file(path / "documents.safetensors") for path in (run.path, STORED / "finished"))
    assert losses.keys() == stored.keys()
    for name, tensor in losses.items():
        assert_same_numbers(tensor, stored[name])


def another_order(patch: pytest.MonkeyPatch) -> None:
    batch = ncn.TokenDataset.batch
    patch.setattr(ncn.TokenDataset, "batch", lambda data, seed, *rest: batch(data, seed + 1, *rest))


def optimizers_from_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "load_optimizer_state", lambda *_: None)


@pytest.mark.parametrize("break_it", [another_order, optimizers_from_zero])
def test_a_run_that_goes_on_otherwise_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Any
) -> None:
    break_it(monkeypatch)
    run = resumed(tmp_path)
    for comparison in (assert_same_losses, assert_same_weights):
        with pytest.raises(AssertionError):
            comparison(run)


def test_a_finished_run_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(shutil.copytree(STORED / "finished", tmp_path / "run"))
    summary = train(run.recipe(), STORED / "data", run.path, valid=STORED / "valid", resume=True, progress=False)
    assert summary == json.loads((STORED / "finished" / "summary.json").read_text("utf-8"))
    assert "finished already" in capsys.readouterr().out


@torch.inference_mode()
def test_a_trained_model_gives_the_recorded_logits() -> None:
    model, _ = ncn.load(STORED / "finished")
    talk = ncn.ControlInputs(sliders=torch.full((1, 1, 1), 0.9))
    assert_same_numbers(model(RECORDED["ids"]).logits, RECORDED["logits"])
    assert_same_numbers(model(RECORDED["ids"], control=talk).logits, RECORDED["logits_talk_0.9"])


def test_a_trained_model_writes_the_recorded_texts() -> None:
    model, tokenizer = ncn.load(STORED / "finished")
    for name, options in (("greedy", {}), ("greedy_guided", {"sliders": {"talk": 0.9}, "guidance": 4.0})):
        assert "".join(generate(model, tokenizer, FACTS["prompt"], temperature=0.0, **options)) == FACTS[name]
    assert FACTS["greedy"] != FACTS["greedy_guided"]


def test_a_saved_scan_is_read_and_comes_out_again() -> None:
    text = (STORED / "scan.json").read_text("utf-8")
    stored = ncn.Scan.from_json(text)
    assert json.loads(stored.to_json()) == json.loads(text)
    model, tokenizer = ncn.load(STORED / "finished")
    again = ncn.scan(model, tokenizer, stored.text, name=stored.model)
    assert (again.tokens, again.neutral, again.bounds) == (stored.tokens, stored.neutral, stored.bounds)
    assert again.surprisal == approximately(stored.surprisal)
    assert again.signals.keys() == stored.signals.keys()
    for name, values in again.signals.items():
        assert_same_numbers(torch.tensor(values), torch.tensor(stored.signals[name]))


@pytest.mark.xdist_group("transformers")
def test_a_controller_finds_its_base_and_gives_the_recorded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(STORED)  # where the controller says that its base is
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    ids = RECORDED["ids"]
    with torch.no_grad():
        assert_same_numbers(base(input_ids=ids).logits, RECORDED["base_logits"])
    handle = ncn.load_controller(base, "controller")
    with torch.no_grad():
        assert_same_numbers(base(input_ids=ids).logits, RECORDED["controlled_logits"])
        with handle.disable():
            assert_same_numbers(base(input_ids=ids).logits, RECORDED["base_logits"])
    model, tokenizer = ncn.load("controller")
    assert tokenizer.fingerprint == ncn.TokenDataset.open("data").tokenizer().fingerprint
    with torch.no_grad():
        assert_same_numbers(model(ids).logits, RECORDED["controlled_logits"])
