"""The run folder: what it refuses, what survives a kill, and how it is read back."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ncn.errors import UserError
from ncn.machine.environment import command_words, describe_environment
from ncn.machine.files import disk_problem_in_one_line, read_json
from ncn.training.checkpoints import KEPT_CHECKPOINTS, read_checkpoint
from ncn.training.run_folder import RunFolder
from tiny import assert_nothing_half_written, recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", recipe(), {"data": "abc", "validation": None})


def test_a_new_run_holds_its_recipe_and_its_environment(run: RunFolder) -> None:
    opened = RunFolder.open(run.path)
    assert opened.recipe() == recipe()
    assert opened.environment() == {"data": "abc", "validation": None}
    assert not opened.finished
    assert opened.metrics() == []
    assert opened.checkpoints() == []
    assert_nothing_half_written(run.path)


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, recipe(), {})
    assert RunFolder.open(tmp_path).recipe() == recipe()


def test_a_file_is_not_a_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file already exists and is not empty; choose another --out"):
        RunFolder.create(tmp_path / "file", recipe(), {})


def test_what_is_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.json"):
        RunFolder.open(tmp_path)


def test_a_recipe_from_another_version_names_the_unknown_setting(run: RunFolder) -> None:
    content = json.loads((run.path / "config.json").read_text())
    content["train"]["learning_rat"] = 1
    (run.path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"unknown setting 'train.learning_rat'; did you mean 'learning_rate'"):
        run.recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"[1]", "a JSON object")],
)
def test_unreadable_json_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json.*{message}"):
        read_json(tmp_path / "x.json")


def test_a_half_written_last_line_is_ignored(run: RunFolder) -> None:
    run.append_metrics({"step": 1, "loss": 2.5})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 2.5}]

    run.truncate_metrics(5)
    run.append_metrics({"step": 2, "loss": 2.0})
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_metrics_after_a_step_are_forgotten(run: RunFolder) -> None:
    for step in (3, 6, 9):
        run.append_metrics({"step": step})
    run.truncate_metrics(6)
    assert [line["step"] for line in run.metrics()] == [3, 6]


def test_amending_twice_is_amending_once(run: RunFolder) -> None:
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    assert run.amend_metrics({"validation_loss": 1.5}) == run.amend_metrics({"validation_loss": 1.5})
    assert run.metrics() == [{"step": 1}, {"step": 2, "validation_loss": 1.5}]


def test_a_checkpoint_comes_back_exactly(run: RunFolder) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.randn(2).bfloat16()}
    path = run.save_checkpoint(12, tensors, {"step": 12, "seconds": 0.1})
    read = read_checkpoint(path)
    assert read.facts == {"step": 12, "seconds": 0.1}
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(read.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_only_the_last_checkpoints_are_kept(run: RunFolder) -> None:
    for step in (1, 2, 10, 100):
        run.save_checkpoint(step, {"a": torch.zeros(1)}, {"step": step})
    assert [path.name for path in run.checkpoints()] == ["step-00000100.safetensors", "step-00000010.safetensors"]
    assert len(run.checkpoints()) == KEPT_CHECKPOINTS
    found = run.load_checkpoint(pytest.fail)
    assert found is not None
    assert found.facts["step"] == 100


def test_what_a_kill_left_of_a_save_is_cleared_away(run: RunFolder) -> None:
    run.save_checkpoint(1, {"a": torch.zeros(1)}, {"step": 1})
    for name in (".tmpAbC123", "step-00000002.safetensors.part"):
        (run.path / "checkpoints" / name).write_bytes(b"half")
    found = run.load_checkpoint(pytest.fail)
    assert found is not None
    assert_nothing_half_written(run.path)


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a checkpoint of this program; remove it"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_an_empty_run_has_no_checkpoint(run: RunFolder) -> None:
    assert run.load_checkpoint(pytest.fail) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; what was saved before is intact"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; what was saved before is intact"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; choose a folder that can be written"),
    ],
)
def test_disk_problems_are_one_line(tmp_path: Path, error: OSError, message: str) -> None:
    with pytest.raises(UserError, match=f"cannot write to .*: {message}"), disk_problem_in_one_line(tmp_path):
        raise error


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_problem_in_one_line(tmp_path):
        raise KeyError("x")


def test_the_environment_names_versions_and_commit() -> None:
    environment = describe_environment(torch.device("cpu"), data="abc")
    assert environment["torch"] == torch.__version__
    assert environment["data"] == "abc"
    assert environment["threads"] == torch.get_num_threads()
    assert environment["commit"] is None or len(environment["commit"]) == 40
    json.dumps(environment)


@pytest.mark.parametrize("program", ["/bin/ncn", "/lib/ncn/__main__.py"])
def test_a_command_is_written_down_as_users_type_it(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, "ab", "--seeds", "2"])
    assert command_words() == ["ncn", "ab", "--seeds", "2"]
