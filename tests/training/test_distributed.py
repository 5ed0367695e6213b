"""Training in several processes is the training of one: draws are made for the whole batch, and wrappers see it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ncn.errors import UserError
from ncn.steering.attributes import write_attributes
from ncn.steering.documents import DocumentInputs
from ncn.training.begin import begin
from ncn.training.distributed import Processes
from ncn.training.session import Training
from tiny import prepare_text, recipe, stories

SLIDERS = {"controller": {"width": 8, "hidden": 8, "pooling_heads": 2, "sliders": ["length", "dialogue"]}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories with attributes."""
    folder = tmp_path_factory.mktemp("measured") / "data"
    prepare_text(folder, stories(0, 12_000), vocab_size=300)
    write_attributes(folder)
    return folder


def awake(out: Path, data: Path, processes: Processes | None = None, **train: Any) -> Training:
    """A run before its first step, its signals far from neutral."""
    settings = {"input_dropout": 0.5, "single_input_dropout": 0.3, "batch_size": 4, "context": 31} | train
    training = begin(recipe(SLIDERS, **settings), data, out, valid=None, resume=False)
    training.processes = processes or Processes()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # a batch in which some positions of the first rows have no target, because an epoch ends there
    for step in range(2000):
        targets = training.dataset.batch(training.config.seed, step, 4, 31).targets
        if (targets[:2] == -100).any() and not (targets[2:] == -100).any():
            training.step = step
            training.total_steps = 2 * step
            return training
    raise AssertionError("no such batch")


def gradients(training: Training) -> dict[str, Tensor]:
    batch = training.dataset.batch(training.config.seed, training.step, 4, 31)
    training.differentiate(batch)
    return {name: parameter.grad for name, parameter in training.model.named_parameters() if parameter.grad is not None}


def sum_of_ranks(folder: Path, data: Path) -> dict[str, Tensor]:
    first, second = (gradients(awake(folder / f"{rank}", data, Processes(rank, 2))) for rank in (0, 1))
    assert first.keys() == second.keys()
    return {name: first[name] + second[name] for name in first}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_sum_to_one_with_two_micro_batches_bit_for_bit(tmp_path: Path, measured: Path) -> None:
    whole = gradients(awake(tmp_path / "whole", measured, accumulation=2))
    assert equal(sum_of_ranks(tmp_path, measured), whole)


def test_a_count_of_the_own_targets_is_noticed(tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(awake(tmp_path / "whole", measured, accumulation=2))
    original = Training.differentiate

    def local(training: Training, batch: Any) -> Any:
        own = training.processes.rows(4)
        targets = batch.targets.clone()
        targets[: own.start] = targets[own.stop :] = -100
        return original(training, batch._replace(targets=targets))

    monkeypatch.setattr(Training, "differentiate", local)
    assert not equal(sum_of_ranks(tmp_path, measured), whole)


def test_draws_made_by_each_process_are_noticed(
    tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(awake(tmp_path / "whole", measured, accumulation=2))
    original = DocumentInputs.batch

    def own(inputs: DocumentInputs, seed: int, step: int, rows: int, *rest: Any) -> Any:
        half = original(inputs, seed, step, rows // 2, *rest)  # as if a process drew for its rows alone
        return half._replace(sliders=torch.cat([half.sliders, half.sliders]))

    monkeypatch.setattr(DocumentInputs, "batch", own)
    assert not equal(sum_of_ranks(tmp_path, measured), whole)


def test_rows_are_dealt_in_order_and_only_equally() -> None:
    assert [Processes(rank, 3).rows(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert Processes().rows(5) == slice(0, 5)
    with pytest.raises(UserError, match="a batch of 5 cannot be shared equally by 2 processes; set batch_size to"):
        Processes(0, 2).rows(5)


PROGRAM = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

folder, data, rank, wrapped = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "wrapped"
dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
from ncn.training.distributed import Processes
from test_distributed import awake, gradients

training = awake(folder / f"rank-{rank}", data, Processes(rank, 2))
parallel = DistributedDataParallel(training.objective)
if wrapped:
    training.objective = parallel
found = {name: (2 * gradient).tolist() for name, gradient in gradients(training).items()}
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bypassed"])
def test_a_wrapper_of_the_objective_sees_all_that_is_differentiated(
    tmp_path: Path, measured: Path, wrapped: bool
) -> None:
    """Two real processes average their gradients where the objective is wrapped, and where it is bypassed do not."""
    whole = gradients(awake(tmp_path / "whole", measured, accumulation=2))
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), *sys.path])
    environment = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path), str(measured)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments, str(rank), "wrapped" if wrapped else "bypassed"],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        same = all(torch.equal(torch.tensor(found[name]), whole[name]) for name in whole)
        assert same == wrapped
