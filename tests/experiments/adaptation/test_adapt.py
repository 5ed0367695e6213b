"""`ncn adapt`: equal sizes, what moves and what does not, going on after an interruption, and the page."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncn
from ncn.data.prepare import prepare
from ncn.experiments.adaptation import costs as adapt_costs
from ncn.experiments.adaptation.lesson import Lesson, losses_of, train_adapter
from ncn.experiments.adaptation.report import summarise
from ncn.experiments.adaptation.run import run_adaptation, weights_sha256
from ncn.inference.document_losses import by_document
from ncn.retrofit.adapters import METHODS, Adapted, adapt, matched_sizes
from ncn.retrofit.bases import load_base
from retrofits import base as tiny_base
from retrofits import ids
from tiny import prepare_text, stories

pytestmark = pytest.mark.xdist_group("transformers")
CONTROLLER = ncn.ControllerConfig(width=8, pooling_heads=2, hidden=8)
SETTINGS = [
    "tokens=500",
    "batch_size=2",
    "context=32",
    "controller.width=8",
    "controller.hidden=4",
    "precision=float32",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its own domain, and another one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapt")
    prepare_text(folder / "old", stories(0, 400), vocab_size=300)
    others = [f"{n} birds and {n + 3} fish sang a song. The song was {n % 7} days long." for n in range(700)]
    (folder / "new.txt").write_text("\n<|endoftext|>\n".join(others))
    (folder / "valid.txt").write_text("\n<|endoftext|>\n".join(others[::9]))
    for name in ("new", "valid"):
        prepare([str(folder / f"{name}.txt")], folder / name, tokenizer=str(folder / "old"))
    data = ncn.TokenDataset.open(folder / "old")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(
        "llama", vocab_size=data.vocab_size, **shape, **special, num_key_value_heads=2, max_position_embeddings=128
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    data.tokenizer().save(folder / "base")
    return folder


def run(place: Path, out: Path, **options: Any) -> Any:
    given = {"data": place / "new", "valid": place / "valid", "old": place / "old", "settings": SETTINGS}
    given |= {"seeds": 2, "eval_tokens": 1500, "progress": False, "say": lambda line: None}
    return run_adaptation(place / "base", out, **given | options)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapt_costs, "ROUNDS", 2)
        patched.setattr(adapt_costs, "CONTINUED", 4)
        run(place, place / "experiment")
    return place / "experiment"


def adapted(method: Any, size: int | None) -> tuple[Adapted, torch.Tensor]:
    """A tiny Llama with an adapter, and what it computed before."""
    model = tiny_base("llama", vocab_size=300)
    with torch.no_grad():
        before = model(input_ids=ids(), use_cache=False).logits
    torch.manual_seed(1)
    return adapt(model, method, size, CONTROLLER), before


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_sizes_agree_to_half_a_step_of_the_finest_dial(name: str) -> None:
    model = tiny_base(name)
    sizes = matched_sizes(model.config, CONTROLLER)
    counts = {
        method: adapt(tiny_base(name), method, size, CONTROLLER).num_parameters() for method, size in sizes.items()
    }
    for method, size in sizes.items():
        next_one = adapt(tiny_base(name), method, size + 1, CONTROLLER).num_parameters()
        assert abs(counts[method] - counts["lora"]) <= (next_one - counts[method]) / 2
    assert abs(counts["ncn"] / counts["lora"] - 1) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_moves(method: Any, place: Path) -> None:
    found, before = adapted(method, 3)
    model = found.model
    trained = {id(parameter) for parameter in found.parameters}
    everything = dict(model.named_parameters())
    assert {id(p) for p in everything.values() if p.requires_grad} == trained
    with torch.no_grad():
        start = found.logits(ids())
    if method != "prefix":  # a prefix begins at random
        torch.testing.assert_close(start, before, rtol=0, atol=0)
    copies = {name: parameter.detach().clone() for name, parameter in everything.items()}
    config = ncn.Recipe.preset("mini").train.model_copy(update={"batch_size": 2, "context": 16, "learning_rate": 1e-2})
    data = ncn.TokenDataset.open(place / "old")
    train_adapter(found, Lesson(data, config, torch.device("cpu"), None), 3, lambda step: None)
    for name, parameter in everything.items():
        assert torch.equal(parameter, copies[name]) != (id(parameter) in trained), name


def test_losses_are_those_of_the_library(place: Path) -> None:
    """The library's own loss over the same windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    data = ncn.TokenDataset.open(place / "valid")
    config = ncn.Recipe.preset("mini").train.model_copy(update={"context": 32})
    found = losses_of(Adapted("full", model, [], print), data, Lesson(data, config, torch.device("cpu"), None))
    total, count = 0.0, 0
    for inputs, targets in data.windows(32, 1):
        kept = int((targets != -100).sum())
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = model.loss_function(logits, None, vocab_size=data.vocab_size, shift_labels=targets)
        total, count = total + float(loss) * kept, count + kept
    assert found.tokens.sum() == count == data.tokens - 1
    assert found.nats.sum() == pytest.approx(total, rel=1e-5)
    assert found.bytes.sum() == data.text_bytes
    assert by_document(np.ones(data.tokens - 1), data).nats.tolist() == found.tokens.tolist()


def test_a_whole_experiment(place: Path, finished: Path) -> None:
    before = weights_sha256(load_base(place / "base"))
    facts = json.loads((finished / "adaptation.json").read_text())
    assert facts["base_sha256"] == before
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert list(summary["methods"]) == list(METHODS)
    assert summary["methods"]["full"]["parameters"] == summary["base"]["parameters"]
    # even so short a training on so small a base gains something where everything may move
    assert summary["methods"]["full"]["gained"]["mean"] > 0.05
    assert len(summary["methods"]["ncn"]["gained"]["per_seed"]) == 2
    for found in summary["methods"].values():
        level = summary["base"]["new"] - found["gained"]["mean"]
        assert found["new_level"] == pytest.approx(level, abs=1e-9)
    assert {row["other"] for row in summary["differences"]} == set(METHODS) - {"ncn"}
    page = (finished / "report" / "adaptation.md").read_text()
    assert "What it costs" in page
    assert (finished / "report" / "adaptation.html").is_file()
    handle = ncn.load_controller(load_base(place / "base"), finished / "adapters" / "ncn-seed1")
    assert handle.num_parameters() == summary["methods"]["ncn"]["parameters"]
    costs = json.loads((finished / "costs.json").read_text())
    assert set(costs["decoding"]) == {"base", *METHODS}


def test_going_on_runs_only_what_is_missing_and_ends_the_same(place: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "again")
    lost = next((tmp_path / "again" / "runs").glob("lora-*-seed2.json"))
    lost.unlink()
    shutil.rmtree(tmp_path / "again" / "report")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "runs").iterdir()}
    run(place, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    one, other = (json.loads((folder / "runs" / lost.name).read_text()) for folder in (finished, tmp_path / "again"))
    assert one.pop("seconds") != other.pop("seconds")
    assert one == other
    name = "report/summary.json"
    assert (finished / name).read_text() == (tmp_path / "again" / name).read_text()


def planted(new: dict[str, list[float]], old: dict[str, list[float]]) -> dict[str, Any]:
    """The summary of an experiment whose losses are given, in nats a byte, a value a seed."""
    documents = {"bytes": [100] * 60, "tokens": [25] * 60}
    facts = {
        "losses": {domain: {"nats": [100.0] * 60, **documents} for domain in ("new", "old")},
        "dials": {}, "base_parameters": 1000, "train": {},
    }  # fmt: skip
    runs: list[dict[str, Any]] = []
    for method, values in new.items():
        common = {"method": method, "multiple": 1.0, "rate": 0.01, "diverged": False, "parameters": 7, "bytes": 1}
        runs.append(common | {"seed": 0, "tuning_loss": 1.0})
        runs.append(common | {"seed": 0, "tuning_loss": 2.0, "multiple": 2.0})
        if method != "ia3":
            runs.append(common | {"seed": 0, "tuning_loss": 2.0, "multiple": 0.5})
        for seed, value in enumerate(values, 1):
            losses = {"new": [100 * value] * 60, "old": [100 * old[method][seed - 1]] * 60}
            runs.append(common | {"seed": seed, "losses": losses, "batches_sha256": f"{seed}"})
    return summarise(facts, runs, list(new), [1, 2, 3])  # type: ignore[arg-type]


def test_a_planted_effect_is_found_and_equal_methods_are_not_told_apart() -> None:
    noise = [0.001, -0.001, 0.0]
    values = {"ncn": 0.8, "lora": 0.9, "ia3": 0.8}
    new = {method: [value + wobble for wobble in noise] for method, value in values.items()}
    new["ia3"] = [0.8005, 0.7999, 0.7998]
    old = {method: [1.1 + wobble for wobble in noise] for method in values}
    found = planted(new, old)
    bits = 1 / np.log(2)
    assert found["methods"]["ncn"]["gained"]["mean"] == pytest.approx(0.2 * bits)
    assert found["methods"]["ncn"]["lost"]["mean"] == pytest.approx(0.1 * bits)
    rows = {row["other"]: row for row in found["differences"]}
    assert rows["lora"]["new"]["mean"] == pytest.approx(-0.1 * bits)
    assert rows["lora"]["new"]["holm_p"] < 0.05 < rows["ia3"]["new"]["holm_p"]
    assert "better than LoRA, not told from IA3" in found["sentence"]
    assert len(found["cautions"]) == 1
    assert "best learning rate of IA3 is the lowest that was tried" in found["cautions"][0]


def refused(call: Any) -> str:
    with pytest.raises(ncn.UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_uses_are_one_line_each(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"data": place / "new", "valid": place / "valid", "old": place / "old"}
    assert "no base model at" in refused(lambda: run_adaptation(tmp_path / "nothing", tmp_path / "out", **given))
    assert "unknown method dora; methods: ncn, lora" in refused(lambda: run(place, tmp_path / "out", methods=["dora"]))
    prepare([str(place / "new.txt")], tmp_path / "other", vocab_size=290)
    assert "different tokenizers" in refused(lambda: run(place, tmp_path / "out", valid=tmp_path / "other"))
    all_other = dict.fromkeys(("data", "valid", "old"), tmp_path / "other")
    assert "another tokenizer than the base's" in refused(lambda: run(place, tmp_path / "out", **all_other))
    changed = refused(lambda: run(place, finished, settings=[*SETTINGS, "clip=2"]))
    assert "begun with train.clip = 1.0, and now it is 2.0" in changed
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(lambda: run(place, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
