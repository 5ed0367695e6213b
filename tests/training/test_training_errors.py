"""Training: one clear line for whatever cannot go on, and nothing of the user's is lost."""

import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.machine.stopping import Interrupted
from ncn.training.checkpoints import read_checkpoint
from ncn.training.run_folder import RunFolder
from ncn.training.session import Training
from tiny import assert_nothing_half_written, assert_same_run, at_step, interrupt, prepare_text, recipe, run, stories


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
