"""Training a controller on a base from the command line, and using what comes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import ncn
from ncn.cli.app import app
from ncn.data.prepare import prepare
from ncn.diagnosis.readers import reader_of
from ncn.inference.evaluate import evaluate
from ncn.inference.generate import generate
from ncn.retrofit.model import RetrofittedModel
from ncn.retrofit.recipe import retrofit_recipe
from ncn.scans.recording import scan
from ncn.steering.attributes import write_attributes
from ncn.training.train import train
from retrofits import attached, base, ids

pytestmark = pytest.mark.xdist_group("transformers")
TEXTS = Path(__file__).parents[1] / "fixtures"
SETTINGS = ["tokens=6_000", "batch_size=4", "context=32", "eval_every=100", "controller.width=8", "controller.hidden=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base that is no controller's, text, and a controller trained on it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("retrofit")
    stories = [f"Tom had {n} apples. He gave one to Sue. Now he has {n - 1}. Sue was happy." for n in range(2, 260)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare([str(folder / "text.txt")], folder / "data", vocab_size=300)
    torch.manual_seed(0)
    shape = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "llama", **shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
    )
    base = AutoModelForCausalLM.from_config(config)
    data = ncn.TokenDataset.open(folder / "data")
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for step in range(40):
        inputs, targets = data.batch(0, step, 8, 32)
        logits = base(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    base.save_pretrained(folder / "base")
    recipe = retrofit_recipe(folder / "base", SETTINGS)
    train(recipe, folder / "data", folder / "run", valid=folder / "data", progress=False)
    return folder


def test_a_run_trains_the_controller_and_keeps_the_base(place: Path) -> None:
    saved = load_file(place / "run" / "model" / "controller.safetensors")
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["parameters"] == sum(tensor.numel() for tensor in saved.values())
    model, _ = ncn.load(place / "run")
    assert isinstance(model, RetrofittedModel)
    data = ncn.TokenDataset.open(place / "data")
    assert (
        evaluate(model, data, context=32).loss < evaluate(model, data, context=32, frozen=_neutral(model)).loss - 0.005
    )
    before = load_file(place / "base" / "model.safetensors")
    for name, tensor in model.base.state_dict().items():
        if name in before:
            assert torch.equal(tensor, before[name])


def test_interrupted_and_continued_it_is_the_same_run(place: Path, tmp_path: Path) -> None:
    recipe = retrofit_recipe(place / "base", [*SETTINGS, "checkpoint_every=10"])
    shutil.copytree(place / "run", tmp_path / "whole")
    train(recipe, place / "data", tmp_path / "other", valid=place / "data", progress=False)
    for name in ("summary.json", "model"):
        target = tmp_path / "other" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    steps = sorted((tmp_path / "other" / "checkpoints").iterdir())
    steps[-1].unlink()
    train(recipe, place / "data", tmp_path / "other", valid=place / "data", resume=True, progress=False)
    one, other = (load_file(tmp_path / run / "model" / "controller.safetensors") for run in ("whole", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_evaluates_generates_scans_and_is_diagnosed(place: Path) -> None:
    model, tokenizer = ncn.load(place / "run")
    data = ncn.TokenDataset.open(place / "data")
    assert isinstance(model, RetrofittedModel)
    said = evaluate(model, data, context=32).loss
    ids = torch.tensor([tokenizer.encode("Tom had 9 apples. He gave one")])
    with model.handle.disable(), torch.no_grad():
        plain = model.base(input_ids=ids, use_cache=False).logits
    assert said < 5
    torch.testing.assert_close(model(ids, frozen=_neutral(model)).logits, plain, rtol=0, atol=0)
    with_cache = "".join(generate(model, tokenizer, "Tom had", max_tokens=20, temperature=0.0, stop_id=-1))
    ids = torch.tensor([[tokenizer.separator_id, *tokenizer.encode("Tom had")]])
    for _ in range(20):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert with_cache == tokenizer.decode(ids[0, 1:].tolist())[len("Tom had") :]
    picture = scan(model, tokenizer, "Tom had 7 apples.")
    assert picture.signals["head_gate"].shape[1:] == (2, 4)
    inputs = ids[:, :10]
    losses, signals = reader_of(model).read(inputs, ids[:, 1:11])
    assert losses.shape == inputs.shape
    assert signals["gain"].shape == (1, 10, 2)


def test_a_controller_on_a_base_is_trained_with_sliders(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    write_attributes(data)
    settings = [*SETTINGS, "controller.sliders=[length]", "controller_learning_rate=3", "tokens=2_000"]
    train(retrofit_recipe(place / "base", settings), data, tmp_path / "run", progress=False)
    model, tokenizer = ncn.load(tmp_path / "run")
    assert isinstance(model, RetrofittedModel)
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "stop_id": -1}
    ids = torch.tensor([[tokenizer.separator_id, *tokenizer.encode("Tom had")]])
    with model.handle.given(sliders={"length": 0.9}):
        expected = model.base.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    assert "".join(generate(model, tokenizer, "Tom had", sliders={"length": 0.9}, **options)) == tokenizer.decode(
        expected.tolist()
    )
    plain = model(ids).logits
    assert not torch.equal(model(ids, control=ncn.ControlInputs(torch.tensor([[[0.9]]]))).logits, plain)


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_the_commands(place: Path, tmp_path: Path) -> None:
    data = shutil.copytree(place / "data", tmp_path / "data")
    write_attributes(data)
    out = tmp_path / "run"
    settings = [*SETTINGS, "tokens=1_000", "controller.sliders=[length]"]
    trained = run("train", "--base", place / "base", "--data", data, "--valid", data, "--out", out, *settings)
    parameters = json.loads((out / "summary.json").read_text())["parameters"]
    assert f"{parameters:,}" in trained
    assert f"a controller of {parameters:,} parameters on {place / 'base'}" in run("info", out)
    assert "signals frozen" in run("evaluate", out, "--data", data, "--context", "32", "--max-tokens", "600")
    written = run("generate", out, "Tom had", "--max-tokens", "8", "--set", "length=0.9", "--guidance", "2")
    assert "Tom had" in written
    assert str(tmp_path / "scan.html") in run("scan", out, "Tom had 7 apples.", "--out", tmp_path / "scan.html")
    run("diagnose", out, "--data", data, "--out", tmp_path / "diagnosis")
    assert (tmp_path / "diagnosis").is_dir()
    run("steer", out, "--data", data, "--out", tmp_path / "steering", "--prompts", "2", "--seeds", "1", "--report")
    assert "| run | the controller | ncn |" in (tmp_path / "steering" / "steer.md").read_text()


def test_the_trainer_trains_the_controller_and_nothing_else(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = base("llama")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    text = [{"input_ids": row, "labels": row} for row in ids(16, 32)]
    handle = ncn.attach(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=3e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=text)  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert any(parameter.abs().sum() > 0 for name, parameter in handle.named_parameters() if "output.weight" in name)
    handle.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_trainer_checkpoints_gradients_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    text = [{"input_ids": row, "labels": row} for row in ids(16, 32)]

    def trained(folder: str, resume: bool = False, **options: Any) -> dict[str, torch.Tensor]:
        model, handle = attached("llama", awake=False)
        arguments = TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=8, learning_rate=3e-2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_steps=3, max_steps=6, seed=1,
            activation_checkpointing_kwargs={"use_reentrant": False}, **options,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=text).train(resume_from_checkpoint=resume)  # type: ignore[arg-type]
        return {name: value.detach().clone() for name, value in handle.named_parameters()}

    plain = trained("plain")
    whole = trained("run", activation_checkpointing=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = trained("run", resume=True, activation_checkpointing=True)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-3)
    assert any(value.abs().sum() > 0 for name, value in whole.items() if "output.weight" in name)


def _neutral(model: RetrofittedModel) -> dict[str, torch.Tensor]:
    return model.handle.still("neutral")


def refused(call: Any) -> str:
    with pytest.raises(ncn.UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_uses_are_one_line_each(place: Path, tmp_path: Path) -> None:
    assert "no base model at" in refused(lambda: retrofit_recipe(tmp_path / "nothing"))
    assert "leave out --baseline" in refused(lambda: retrofit_recipe(place / "base", ["model.controller=null"]))
    prepare([str(place / "text.txt")], tmp_path / "large", vocab_size=310)
    recipe = retrofit_recipe(place / "base", SETTINGS)
    assert "prepare it with --tokenizer" in refused(lambda: train(recipe, tmp_path / "large", tmp_path / "run"))
    other = shutil.copytree(place / "base", tmp_path / "base")
    shutil.copy(tmp_path / "large" / "tokenizer.json", other)
    of_other = retrofit_recipe(other, SETTINGS)
    assert "another tokenizer than the base's" in refused(lambda: train(of_other, place / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    moved = tmp_path / "moved"
    shutil.copytree(place / "run", moved)
    content = json.loads((moved / "model" / "controller.json").read_text())
    content["base_name"] = str(tmp_path / "gone")
    (moved / "model" / "controller.json").write_text(json.dumps(content))
    assert "no base model at" in refused(lambda: ncn.load(moved))
