"""A model, a text and a run so small that a test can train it many times."""

import json
import lzma
import os
import signal
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset
from ncn.data.prepare import prepare
from ncn.training.checkpoints import read_checkpoint
from ncn.training.run_folder import RunFolder
from ncn.training.session import Training
from ncn.training.train import train

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 32,
    "controller": {"width": 8, "hidden": 8, "pooling_heads": 2},
}
TRAIN: dict[str, Any] = {
    "tokens": 20 * 4 * 32,  # 20 steps
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup": 0.1,
    "log_every": 3,
    "eval_every": 5,
    "eval_tokens": 256,
    "checkpoint_every": 4,
    "precision": "float32",
    "homeostatic_weight": 0.1,
}
STEPS = 20


def recipe(model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe.parse({"model": MODEL | (model or {}), "train": TRAIN | train})


def run(recipe: Recipe, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Train without a bar."""
    return train(recipe, data, out, progress=False, **options)


def stories(first: int, last: int) -> str:
    """A stretch of the bundled sample, in characters."""
    packed = resources.files("ncn").joinpath("assets/tinystories_train.txt.xz").read_bytes()
    return lzma.decompress(packed)[first:last].decode("utf-8", errors="ignore")


def prepare_text(folder: Path, text: str, **options: Any) -> TokenDataset:
    source = folder.with_suffix(".txt")
    source.write_text(text, "utf-8")
    prepare([str(source)], folder, workers=1, progress=False, **options)
    return TokenDataset.open(folder)


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[Training], object]]) -> None:
    """Do something in the middle of a real training, just before the step of that number."""
    original = Training.train_step

    def step(training: Training) -> dict[str, torch.Tensor]:
        if training.step in actions:
            actions.pop(training.step)(training)
        return original(training)

    monkeypatch.setattr(Training, "train_step", step)


def interrupt(training: Training) -> None:
    """Ctrl-C, while the next step is computed."""
    os.kill(os.getpid(), signal.SIGINT)


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}


def assert_same_run(one: Path, other: Path) -> None:
    """Every logged number, every weight and every optimiser state bit for bit equal; only the clock may differ."""
    runs = [RunFolder.open(path) for path in (one, other)]
    lines = [[json.dumps(without_times(line)) for line in run.metrics()] for run in runs]
    assert lines[0] == lines[1]
    assert without_times(runs[0].summary()) == without_times(runs[1].summary())
    newest = [run.checkpoints()[0] for run in runs]
    assert newest[0].name == newest[1].name
    states = [read_checkpoint(path).tensors for path in newest]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    files = [(run.model_folder / "model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]


def assert_nothing_half_written(run: Path) -> None:
    assert not [path for path in run.rglob("*") if path.name.endswith(".part") or path.name.startswith(".tmp")]


def write_texts(folder: Path, first: int, documents: int) -> list[str]:
    """calm.txt and, half as long, loud.txt in `folder`: two kinds of text that a model tells apart at once."""
    calm = [f"Tom had {n} cats. They ran home." for n in range(first, first + documents)]
    loud = [f"HEY {n}! STOP! COME HERE!" for n in range(first, first + documents // 2)]
    for name, texts in (("calm", calm), ("loud", loud)):
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(texts))
    return [str(folder / "calm.txt"), str(folder / "loud.txt")]
