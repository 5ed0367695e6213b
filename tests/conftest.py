"""What every test process needs before the first test: one thread, no network, the same random numbers on every run."""

import os

# Before torch, tokenizers and transformers are imported: they read these only once.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "agg"

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a few stories, with a vocabulary of 300."""
    from tiny import prepare_text, stories

    folder = tmp_path_factory.mktemp("tiny") / "data"
    prepare_text(folder, stories(0, 12_000), vocab_size=300)
    return folder


@pytest.fixture(scope="session")
def valid(data: Path) -> Path:
    """Other stories, in the tokens of `data`."""
    from tiny import prepare_text, stories

    folder = data.with_name("valid")
    prepare_text(folder, stories(20_000, 23_000), tokenizer=str(data))
    return folder


@pytest.fixture(scope="session")
def finished(data: Path, valid: Path) -> Path:
    """The run folder of an uninterrupted training by `tiny.recipe()`. Do not change it."""
    from ncn.training.train import train
    from tiny import recipe

    out = data.with_name("finished")
    train(recipe(), data, out, valid=valid, progress=False)
    return out
