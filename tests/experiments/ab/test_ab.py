"""An A/B from text to report, tiny: interrupted and continued, on equal batches, refused where it is unfair."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ncn.cli import app
from ncn.cli.ab import parse_variant
from ncn.cli.app import parse_count
from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset
from ncn.errors import UserError
from ncn.experiments.ab.noise import seed_noise
from ncn.experiments.ab.run import run_ab
from ncn.inference.document_losses import DocumentLosses
from ncn.lab.comparison import check_batches
from ncn.lab.tuning import best_rate
from ncn.machine.stopping import Interrupted
from ncn.training.run_folder import RunFolder
from ncn.training.train import train
from tiny import assert_same_run, prepare_text, stories

SETTINGS = (
    "vocab_size=300", "d_model=16", "num_layers=1", "num_heads=2", "d_ff=512", "context_length=32",
    "controller.width=8", "controller.hidden=8", "controller.pooling_heads=2", "tokens=2560", "batch_size=4",
    "precision=float32", "optimizer=adamw", "learning_rate=0.1",
)  # fmt: skip
ARMS = ["baseline", "ncn", "baseline-again"]
QUICK: dict[str, Any] = {"arms": ARMS, "seeds": 2, "tune_tokens": 640, "workers": 2, "progress": False}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    data = prepare_text(folder / "data", stories(0, 15_000), vocab_size=300)
    valid = prepare_text(folder / "valid", stories(20_000, 23_000), tokenizer=str(data.folder))
    return {"data": str(data.folder), "valid": str(valid.folder)}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], said: list[str]) -> Path:
    """An experiment that was stopped by Ctrl-C in the comparison's runs, and continued."""
    out = tmp_path_factory.mktemp("experiment") / "ab"

    def run() -> None:
        run_ab(out, settings=SETTINGS, say=said.append, **QUICK, **texts)

    with pytest.MonkeyPatch.context() as patch:

        def interrupt_in_the_middle(watch: Any) -> None:
            if any(path.stat().st_size for path in (out / "runs").glob("*/*/metrics.jsonl")):
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr("ncn.lab.fleet._Watch.update", interrupt_in_the_middle)
        patch.setattr("ncn.lab.fleet._POLL_SECONDS", 0.02)
        with pytest.raises(Interrupted):
            run()
    assert (out / "tuning.json").is_file()
    assert len(list((out / "runs").glob("*/*/summary.json"))) < len(ARMS) * 2
    del said[:]
    run()
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_it_leaves_what_the_report_needs(experiment: Path, texts: dict[str, str]) -> None:
    facts, valid = read(experiment / "experiment.json"), TokenDataset.open(texts["valid"])
    assert (facts["format"], facts["seeds"], facts["tokens_per_run"], facts["steps"]) == (1, [1, 2], 2560, 20)
    assert facts["data"]["validation_tokens"] == valid.tokens
    assert facts["data"]["validation_text_bytes"] == valid.text_bytes
    assert list(facts["arms"]) == ARMS
    for arm in facts["arms"].values():
        assert arm["seconds_per_step"] > 0
        assert arm["flops_per_token"] > 2 * (arm["parameters"] - 2 * 16) * 0.9
    for name in ARMS:
        for seed in (1, 2):
            run = RunFolder.open(experiment / "runs" / name / f"seed-{seed}")
            documents = DocumentLosses.load(run.path / "documents.safetensors")
            assert len(documents.nats) == valid.documents
            assert documents.loss == run.summary()["validation_loss"]
            assert sum("validation_loss" in line for line in run.metrics()) == 20
    assert (experiment / "report" / "report.html").is_file()


def test_each_arm_runs_at_its_best_rate(experiment: Path) -> None:
    tuning, facts = read(experiment / "tuning.json"), read(experiment / "experiment.json")
    assert list(tuning) == ["baseline", "ncn"]
    for name, found in tuning.items():
        losses = {float(rate): loss for rate, loss in found["losses"].items()}
        assert {0.5, 1, 2} <= losses.keys()
        assert float(found["best"]) == best_rate(losses)
        for rate, loss in found["losses"].items():
            run = RunFolder.open(experiment / "tuning" / name / f"rate-{rate}")
            assert run.summary()["validation_loss"] == loss
            assert run.environment()["validation"] == facts["data"]["tuning"]
    for name, tuned_as in (("baseline", "baseline"), ("ncn", "ncn"), ("baseline-again", "baseline")):
        rate = float(tuning[tuned_as]["best"])
        run = RunFolder.open(experiment / "runs" / name / "seed-1")
        assert run.recipe().train.learning_rate == facts["arms"][name]["recipe"]["train"]["learning_rate"] * rate
        assert run.environment()["validation"] == facts["data"]["validation"]


def test_continued_runs_are_those_of_an_uninterrupted_training(experiment: Path, tmp_path: Path) -> None:
    facts, tuning = read(experiment / "experiment.json"), read(experiment / "tuning.json")
    for name in ("baseline", "ncn"):
        recipe, rate = Recipe.parse(facts["arms"][name]["recipe"]), float(tuning[name]["best"])
        settings = recipe.train
        changes = {"seed": 1, "learning_rate": settings.learning_rate * rate}
        changes["muon_learning_rate"] = settings.muon_learning_rate * rate
        recipe = Recipe(model=recipe.model, train=settings.override(**changes))
        train(recipe, experiment / "data" / "train", tmp_path / name, valid=_valid(experiment), progress=False)
        assert_same_run(tmp_path / name, experiment / "runs" / name / "seed-1")


def _valid(experiment: Path) -> Path:
    """The validation folder, known by its fingerprint."""
    wanted = read(experiment / "experiment.json")["data"]["validation"]
    folders = experiment.parent.parent.glob("texts*/valid")
    return next(folder for folder in folders if TokenDataset.open(folder).fingerprint == wanted)


def test_equal_seeds_have_equal_batches_and_equal_backbones(experiment: Path) -> None:
    def hashes(seed: int) -> set[str]:
        return {RunFolder.open(experiment / "runs" / n / f"seed-{seed}").summary()["batches_sha256"] for n in ARMS}

    assert len(hashes(1)) == len(hashes(2)) == 1
    assert hashes(1) != hashes(2)


def test_the_twin_differs_in_its_initial_weights_alone(experiment: Path) -> None:
    one, other = (RunFolder.open(experiment / "runs" / name / "seed-1") for name in ("baseline", "baseline-again"))
    changed = one.recipe().train.override(init_seed=other.recipe().train.init_seed)
    assert Recipe(model=one.recipe().model, train=changed) == other.recipe()
    weights = [load_file(run.model_folder / "model.safetensors") for run in (one, other)]
    assert not torch.equal(weights[0]["embedding.weight"], weights[1]["embedding.weight"])


def test_it_says_what_it_does_before_it_does_it(experiment: Path, said: list[str]) -> None:
    table, sweeping, *_ = said
    assert table.splitlines()[0].split() == [
        "arm",
        "parameters",
        "gap",
        "d_ff",
        "MFLOPs",
        "a",
        "token",
        "ms",
        "a",
        "step",
    ]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ARMS
    assert "learning rates of 2 arms" in sweeping
    noise = [line for line in said if line.startswith("seed noise")]
    assert ["pilot" in line for line in noise] == [True, False]
    assert all("smallest difference that 2 seeds can show" in line for line in noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, r"begun with seeds = \[1, 2\], and now it is \[1, 2, 3\]; give the same command"),
        ({"arms": ["baseline", "ncn"]}, "has the arms baseline, ncn, baseline-again, and now they are baseline, ncn;"),
        ({"settings": (*SETTINGS, "tokens=5120")}, "begun with tokens_per_run = 2560, and now it is 5120"),
        ({"settings": (*SETTINGS, "clip=2.0")}, r"baseline\.recipe\.train\.clip = 1\.0, and now it is 2\.0"),
        ({"tune_tokens": 1280}, "begun with tokens_per_tuning_run = 640, and now it is 1280"),
        ({"eval_tokens": 300}, "begun with data.validation = "),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(
    experiment: Path, texts: dict[str, str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_ab(experiment, **({"settings": SETTINGS, **QUICK, **texts} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"tune_tokens": 0}, "tune-tokens must be at least 1"),
        ({"eval_tokens": 0}, "eval-tokens must be at least 1"),
        ({"preset": "maxi"}, "unknown preset 'maxi'"),
        ({"settings": ("vocab_size=300", "num_layers=9", "d_ff=8"), "arms": None}, r"cannot be brought within 0\.1%"),
    ],
)
def test_a_mistake_leaves_nothing_behind(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_ab(tmp_path / "ab", **({"settings": SETTINGS, **QUICK} | change))
    assert not (tmp_path / "ab").exists()


def test_runs_on_other_batches_are_not_compared() -> None:
    runs = {("baseline", 1): {"batches_sha256": "a"}, ("ncn", 1): {"batches_sha256": "a"}}
    check_batches(runs | {("ncn", 2): {"batches_sha256": "b"}, ("local", 1): {"diverged": True}})
    with pytest.raises(UserError, match="local and baseline were not trained on the same batches with seed 1"):
        check_batches(runs | {("local", 1): {"batches_sha256": "b"}})


def test_the_noise_is_that_of_differences_whose_mean_is_zero() -> None:
    def run(loss: float) -> dict[str, float]:
        return {"validation_loss": loss, "validation_bits_per_byte": loss / 2}

    said: list[str] = []
    found = seed_noise(
        [(run(1.0), run(1.3)), (run(2.0), run(1.6)), ({"diverged": True}, run(1.0))], 5, "test", said.append
    )
    assert found is not None
    assert found["pairs"] == 2
    assert found["loss"]["deviation"] == pytest.approx((0.25 / 2) ** 0.5)
    assert found["bits_per_byte"]["smallest_effect"] == pytest.approx(found["loss"]["smallest_effect"] / 2)
    assert seed_noise([(run(1.0), run(1.3))], 1, "test", said.append)["loss"]["smallest_effect"] is None
    assert "one seed can show no difference" in said[-1]
    assert seed_noise([({"diverged": True}, run(1.0))], 5, "test", said.append) is None


@pytest.mark.parametrize(
    ("text", "count"), [("200k", 200_000), ("3.3M", 3_300_000), ("1_000", 1000), ("2B", 2 * 10**9)]
)
def test_counts_may_be_abbreviated(text: str, count: int) -> None:
    assert parse_count(text) == count


def test_commas_in_brackets_belong_to_the_value() -> None:
    settings = ["controller.taps=[0,2]", "controller.signals=[gain,precision]", "controller.hidden=8"]
    assert parse_variant("deep:" + ",".join(settings)) == ("deep", settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "many"], "a number of tokens is written 200000, 200k or 3.3M, got 'many'"),
        (["--variant", "deep"], "a variant is written NAME:key=value,key=value, got 'deep'"),
        (["--launcher", "slurm"], "unknown launcher 'slurm'; launchers: local, ray"),
        (["--preset", "mini", "--config", "x.yaml"], "give --preset or --config, not both"),
    ],
)
def test_wrong_words_on_the_command_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["ab", "--out", str(tmp_path / "ab"), *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "ab").exists()
