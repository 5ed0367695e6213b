"""Tasks of documents: stored as the sources were given, the same in every batch, used in training and in generation."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncn
from contracts.variants import SMALL_CONTROLLER, awake, config
from ncn.cli import main
from ncn.config.model import ControllerConfig
from ncn.data.prepare import prepare
from ncn.data.subsets import hold_out
from ncn.inference.decoding import generate_tokens
from ncn.inference.document_losses import document_losses
from ncn.steering.documents import DocumentInputs
from ncn.training.run_folder import RunFolder
from ncn.training.train import train
from tiny import assert_same_run, at_step, interrupt, recipe, write_texts

BOTH = {"controller": {"width": 8, "hidden": 8, "pooling_heads": 2, "tasks": ["calm", "loud"]}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, valid: 200 calm and 100 loud documents, and 20 and 10; plain: the same without tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    sources = write_texts(folder, 0, 200)
    prepare(sources, folder / "data", vocab_size=280, tasks=["calm", "loud"], shard_tokens=700, workers=1)
    prepare(sources, folder / "plain", tokenizer=str(folder / "data"), workers=1)
    sources = write_texts(folder, 500, 20)
    prepare(sources, folder / "valid", tokenizer=str(folder / "data"), tasks=["calm", "loud"], workers=1)
    return folder


def test_each_document_has_the_task_of_its_source(texts: Path) -> None:
    data = ncn.TokenDataset.open(texts / "data")
    assert len(data.manifest.shards) > 3
    assert data.tasks == ("calm", "loud")
    assert data.document_tasks(["loud", "calm"]).tolist() == [1] * 200 + [0] * 100
    assert ncn.TokenDataset.open(texts / "plain").fingerprint == data.fingerprint


def test_a_batch_gives_every_token_its_document_s_task(texts: Path) -> None:
    data = ncn.TokenDataset.open(texts / "data")
    given = DocumentInputs(data, ControllerConfig(tasks=("calm", "loud")))
    decode = data.tokenizer().decode
    for step in range(3):
        batch, tasks = data.batch(7, step, 8, 32), given.batch(7, step, 8, 32, 0.0, 0.0).tasks
        assert tasks is not None
        assert torch.equal(tasks, given.batch(7, step, 8, 32, 0.0, 0.0).tasks)
        for ids, row in zip(batch.inputs, tasks, strict=True):
            border = (ids == data.separator_id).nonzero().flatten().tolist()
            for start, end in itertools.pairwise(border):
                assert row[start:end].tolist() == [int("!" in decode(ids[start:end].tolist()))] * (end - start)
    dropped = np.stack([(given.batch(7, step, 16, 32, 0.25, 0.1).tasks == -1).numpy() for step in range(100)])
    assert (dropped.all(-1) == dropped.any(-1)).all()  # a window at a time
    assert dropped[..., 0].mean() == pytest.approx(0.25 + 0.75 * 0.1, abs=0.04)


def test_a_held_out_split_keeps_the_tasks(texts: Path, tmp_path: Path) -> None:
    both = prepare(
        write_texts(tmp_path, 0, 600), tmp_path / "data", tokenizer=str(texts / "data"), tasks=["calm", "loud"]
    )
    first, last = hold_out(ncn.TokenDataset.open(tmp_path / "data"), tmp_path / "train", tmp_path / "tuning")
    counted = [record.documents for part in (first, last) for record in part.manifest.tasks]
    assert both.documents == sum(counted) == 900
    assert [record.name for record in first.manifest.tasks] == ["calm", "loud"]
    assert last.tasks == ("loud",)


def test_training_uses_them_and_continues_bit_for_bit(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"valid": texts / "valid", "progress": False}
    train(recipe(BOTH), texts / "data", tmp_path / "whole", **options)
    at_step(monkeypatch, {9: interrupt})
    with pytest.raises(ncn.machine.stopping.Interrupted):
        train(recipe(BOTH), texts / "data", tmp_path / "parts", **options)
    train(recipe(BOTH), texts / "data", tmp_path / "parts", resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    train(recipe(BOTH, input_dropout=1.0), texts / "data", tmp_path / "without", **options)
    name = "controller.networks.0.external.tasks.weight"
    trained, without = (ncn.load(tmp_path / run)[0].state_dict()[name] for run in ("whole", "without"))
    assert not torch.equal(trained, without)


def test_validation_is_by_task_with_the_tasks_given(texts: Path, tmp_path: Path) -> None:
    train(recipe(BOTH), texts / "data", tmp_path / "run", valid=texts / "valid", progress=False)
    run, valid = RunFolder.open(tmp_path / "run"), ncn.TokenDataset.open(texts / "valid")
    model, _ = ncn.load(tmp_path / "run")
    given = DocumentInputs(valid, model.config.controller)
    losses = document_losses(model, valid, document_inputs=given)
    found = run.summary()["validation_tasks"]
    assert set(found) == {"calm", "loud"}
    assert found["loud"]["validation_loss"] == pytest.approx(losses.nats[20:].sum() / losses.tokens[20:].sum())
    assert found["calm"]["validation_bits_per_byte"] == pytest.approx(losses.by_task(valid)["calm"].bits_per_byte)
    assert run.summary()["validation_loss"] == pytest.approx(losses.loss)
    assert losses.loss != document_losses(model, valid).loss
    assert all(set(line["validation_tasks"]) == set(found) for line in run.metrics() if "validation_loss" in line)


def test_generation_with_a_task() -> None:
    model = awake(config(SMALL_CONTROLLER | {"tasks": ["calm", "loud"], "sliders": ["long"]}))

    def made(**options: Any) -> list[int]:
        return list(generate_tokens(model, [3, 4, 5], max_tokens=6, temperature=0.0, **options))

    for place, name in enumerate(("calm", "loud")):
        ids = [3, 4, 5]
        for _ in range(6):
            control = ncn.ControlInputs(tasks=torch.tensor([[place]]))
            ids.append(int(model(torch.tensor([ids]), control=control).logits[0, -1].argmax()))
        assert made(task=name) == ids[3:]
    assert made(task="calm", guidance=0.0) == made()
    with pytest.raises(ncn.UserError, match="this model has no task 'sad'; it has calm, loud"):
        made(task="sad")
    with pytest.raises(ncn.UserError, match="this model has no task 'calm'; it has none"):
        list(generate_tokens(awake(config()), [3], max_tokens=2, task="calm"))


def test_a_run_may_begin_at_a_trained_model(texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"valid": texts / "valid", "progress": False}
    train(recipe(BOTH), texts / "data", tmp_path / "first", **options)
    short = recipe(BOTH, tokens=1, learning_rate=1e-30)
    train(short, texts / "data", tmp_path / "second", start=tmp_path / "first", **options)
    losses = [RunFolder.open(tmp_path / name).summary()["validation_loss"] for name in ("first", "second")]
    assert losses[0] == losses[1]
    with pytest.raises(ncn.UserError, match=r"the weights to begin at are not those .* give the same --start"):
        train(short, texts / "data", tmp_path / "second", resume=True, **options)
    for wrong, words in (
        ({"d_model": 32} | BOTH, "d_model is 16 there and 32 here"),
        ({"controller": {**BOTH["controller"], "tasks": ["calm", "loud", "sad"]}}, r"controller\.tasks is "),
    ):
        with pytest.raises(ncn.UserError, match=words):
            train(recipe(wrong), texts / "data", tmp_path / "none", start=tmp_path / "first", **options)
    prepare([str(texts / "calm.txt")], tmp_path / "other", vocab_size=280, workers=1)
    with pytest.raises(ncn.UserError, match="prepared with another tokenizer than that of"):
        train(recipe(), tmp_path / "other", tmp_path / "none", start=tmp_path / "first", progress=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("tasks", "place", "words"),
    [
        (["calm"], "data", "belong to the tasks calm, loud, and 'loud' is not among calm: name all of them"),
        (["calm", "luod"], "data", "'loud' is not among calm, luod"),
        (["calm", "loud"], "plain", "belong to no tasks: prepare them with one --task for each source"),
    ],
)
def test_wrong_use_is_one_line(texts: Path, tmp_path: Path, tasks: list[str], place: str, words: str) -> None:
    wrong = recipe({"controller": {**BOTH["controller"], "tasks": tasks}})
    with pytest.raises(ncn.UserError, match=words) as caught:
        train(wrong, texts / place, tmp_path / "none", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_tasks_are_given_for_all_sources_and_stay_the_same(texts: Path, tmp_path: Path) -> None:
    sources = [str(texts / "calm.txt"), str(texts / "loud.txt")]
    with pytest.raises(ncn.UserError, match="1 --task for 2 sources: give one for each source, in the same order"):
        prepare(sources, tmp_path / "data", vocab_size=280, tasks=["calm"])
    prepare(sources, tmp_path / "data", vocab_size=280, tasks=["calm", "loud"])
    with pytest.raises(ncn.UserError, match="was begun with tasks"):
        prepare(sources, tmp_path / "data", vocab_size=280, tasks=["loud", "calm"])
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["tasks"][1]["name"] == "loud"


def test_the_commands(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ncn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    sources = [texts / "calm.txt", texts / "loud.txt"]
    made = ["--tokenizer", texts / "data", "--out", tmp_path / "data"]
    assert command("prepare", *sources, "--task", "calm", "--task", "loud", *made)[0] == 0
    assert ncn.TokenDataset.open(tmp_path / "data").tasks == ("calm", "loud")
    (tmp_path / "recipe.json").write_text(recipe(BOTH, tokens=500).model_dump_json())
    where = ["--data", tmp_path / "data", "--valid", texts / "valid"]
    status, printed, _ = command("train", "--config", tmp_path / "recipe.json", *where, "--out", tmp_path / "first")
    assert status == 0
    assert "validation_tasks.loud.validation_bits_per_byte" in printed
    start = ["--start", tmp_path / "first"]
    assert command("train", *start, *where, "--out", tmp_path / "second", "tokens=300", "batch_size=4")[0] == 0
    assert RunFolder.open(tmp_path / "second").recipe().model == RunFolder.open(tmp_path / "first").recipe().model
    written = [
        command("generate", tmp_path / "second", "Tom", "--max-tokens", 20, "--seed", 1, *task)[1]
        for task in ([], ["--task", "loud"], ["--task", "loud"])
    ]
    assert written[1] == written[2]
    assert command("generate", tmp_path / "second", "Tom", "--task", "sad") == (
        1, "", "error: this model has no task 'sad'; it has calm, loud\n",
    )  # fmt: skip
