"""Files of the version before the folders: read, and gone on with, to the numbers that it recorded itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ncn
from ncn.data.dataset import Batch, TokenDataset
from ncn.generate import generate_tokens
from ncn.machine.environment import describe_environment
from ncn.scans.scan import Scan
from ncn.train import train
from ncn.training.run_folder import RunFolder

FILES = Path(__file__).parents[1] / "fixtures" / "version-0.1"
RECORDED: dict[str, Tensor] = load_file(FILES / "recorded.safetensors")
SENTENCE = "Tom had a red ball. But he was sad."


def same_machine() -> bool:
    """Whether numbers must be equal to the last bit: they were computed on such a processor, with this torch."""
    here, there = describe_environment(torch.device("cpu")), RunFolder.open(FILES / "finished").environment()
    return all(here[key] == there[key] for key in ("device", "torch", "platform", "threads"))


def assert_same(one: Tensor, other: Tensor, name: str = "") -> None:
    if same_machine():
        assert torch.equal(one, other), name
    else:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_its_data_is_whole() -> None:
    for name in ("data", "valid"):
        TokenDataset.open(FILES / name).verify()


def test_its_model_reads_and_writes_as_it_did() -> None:
    model, tokenizer = ncn.load(FILES / "finished")
    assert torch.tensor([tokenizer.encode(SENTENCE)]).equal(RECORDED["ids"])
    with torch.no_grad():
        assert_same(model.read(RECORDED["ids"]).logits, RECORDED["logits"])
    written = generate_tokens(model, RECORDED["ids"][0].tolist(), max_tokens=12, temperature=0.0)
    assert list(written) == RECORDED["written"].tolist()


def test_its_scan_is_read_and_made_again() -> None:
    text = (FILES / "scan.json").read_text("utf-8")
    stored = Scan.from_json(text)
    assert stored.to_json() == text
    model, tokenizer = ncn.load(FILES / "finished")
    again = ncn.scan(model, tokenizer, SENTENCE)
    assert again.tokens == stored.tokens
    for name, values in stored.signals.items():
        assert_same(torch.from_numpy(again.signals[name]), torch.from_numpy(values), name)


def test_its_controller_fits_its_base() -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(FILES / "base").eval()
    with torch.no_grad():
        plain = base(input_ids=RECORDED["ids"], use_cache=False).logits
        ncn.load_controller(base, FILES / "controller")
        found = base(input_ids=RECORDED["ids"], use_cache=False).logits
    assert_same(found, RECORDED["base_logits"])
    assert not torch.allclose(found, plain, atol=1e-3)


def went_on(folder: Path) -> RunFolder:
    """The run that was interrupted, resumed to its end."""
    shutil.copytree(FILES / "interrupted", folder)
    recipe = RunFolder.open(folder).recipe()
    train(recipe, FILES / "data", folder, valid=FILES / "valid", resume=True, progress=False)
    return RunFolder.open(folder)


def losses(run: RunFolder) -> list[float]:
    """Every logged loss, training and validation."""
    return [line[key] for line in run.metrics() for key in ("loss", "validation_loss") if key in line]


def test_its_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    run, whole = went_on(tmp_path / "run"), RunFolder.open(FILES / "finished")
    assert len(run.metrics()) == len(whole.metrics()) > 6
    assert_same(torch.tensor(losses(run)).double(), torch.tensor(losses(whole)).double())
    assert run.summary()["batches_sha256"] == whole.summary()["batches_sha256"]
    weights = [load_file(folder.model_folder / "model.safetensors") for folder in (run, whole)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert_same(tensor, weights[1][name], name)


def test_a_run_that_goes_on_differently_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenDataset.batch

    def turned(dataset: TokenDataset, seed: int, step: int, *rest: int, **options: int) -> Batch:
        return original(dataset, seed, step + 1, *rest, **options)

    monkeypatch.setattr(TokenDataset, "batch", turned)
    run, whole = went_on(tmp_path / "run"), RunFolder.open(FILES / "finished")
    difference = torch.tensor(losses(run)) - torch.tensor(losses(whole))
    assert difference.abs().max() > 1e-3
    assert json.dumps(run.metrics()[0]["loss"]) == json.dumps(whole.metrics()[0]["loss"])  # from before it was stopped
