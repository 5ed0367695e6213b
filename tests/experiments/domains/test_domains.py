"""Two domains in one model: planted effects are found, equal arms are not told apart, and the texts are balanced."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import ncn
from ncn.data.prepare import prepare
from ncn.experiments.domains.forgetting import SHARES, Curve, at_equal_level, shielding
from ncn.experiments.domains.run import run_domains
from ncn.experiments.domains.separation import STRETCHES, DomainRecord, distances, read_out
from ncn.experiments.domains.texts import documents_of, equal, make_domain_data, spread
from ncn.statistics.seeds import mean_over_seeds
from ncn.training.run_folder import RunFolder
from tiny import write_texts


def forgetting_run(random: np.random.Generator, price: float, speed: float) -> Curve:
    """A run that forgets `price` bits per byte of A for each that it gains on B, whose gain comes at some `speed`."""
    gains = 0.8 * (1 - np.exp(-speed * np.arange(11) / 10))
    start = random.normal(2.0, 0.05)
    return Curve(1.0 + price * gains**1.5 + random.normal(0, 0.003, 11), start - gains)


def test_what_is_forgotten_at_a_gain_lies_between_the_points() -> None:
    curve = Curve([1.0, 1.1, 1.4, 1.3], [2.0, 1.8, 1.7, 1.75])
    assert curve.most_gained == pytest.approx(0.3)
    assert curve.forgotten_at(0.0) == 0
    assert curve.forgotten_at(0.1) == pytest.approx(0.05)
    assert curve.forgotten_at(0.25) == pytest.approx(0.25)
    assert curve.forgotten_at(0.3) == pytest.approx(0.4)
    assert np.isnan(curve.forgotten_at(0.31))


def test_an_arm_that_forgets_less_at_equal_gain_is_found_whatever_its_speed() -> None:
    random = np.random.default_rng(0)
    twins = [forgetting_run(random, price=0.5, speed=3.0) for _ in range(4)]
    shielded = [forgetting_run(random, price=0.4, speed=6.0) for _ in range(4)]  # faster: it ends with more forgotten
    assert shielded[0].forgotten[3] > twins[0].forgotten[3]
    found = shielding(shielded, twins)
    assert set(found) == {f"{share:g}" for share in SHARES}
    last = found["1"]
    assert last["difference"]["high"] < 0
    expected = -0.1 * np.mean([min(a.most_gained, b.most_gained) ** 1.5 for a, b in zip(shielded, twins, strict=True)])
    assert last["difference"]["value"] == pytest.approx(expected, abs=0.02)
    assert last["forgotten"] - last["twin"] == pytest.approx(last["difference"]["value"])
    level = at_equal_level(shielded, twins)
    assert level["difference"]["value"] == pytest.approx(level["first"] - level["twin"])
    assert at_equal_level(twins, twins)["difference"]["value"] == 0


def test_equal_arms_are_not_told_apart() -> None:
    wrong = 0
    for number in range(200):
        random = np.random.default_rng(number)
        one, other = ([forgetting_run(random, 0.5, 4.0) for _ in range(4)] for _ in range(2))
        found = shielding(one, other)["1"]["difference"]
        wrong += not found["low"] <= 0 <= found["high"]
    assert wrong / 200 < 0.1
    assert mean_over_seeds([0.2])["low"] is None


def test_texts_are_equal_in_size_and_spread() -> None:
    documents = [(place, place + 10) for place in range(0, 1000, 10)]
    assert spread(documents, 200) == documents[::5]
    assert spread([(0, 500), (500, 520)], 40) == [(0, 20), (500, 520)]
    assert equal([documents, [(0, 25), (30, 55)]]) == [documents[:5], [(0, 25), (30, 55)]]


def plant(random: np.random.Generator, apart: float, count: int = 4000) -> DomainRecord:
    """Signals of one layer: "own" differs between the domains, "token" depends on the token alone, of which one domain
    has more high ones, and "still" does not move."""
    domain = np.repeat([0, 1], count)
    tokens = random.integers(0, 20 + 10 * domain)
    noise = random.normal(0, 1, 2 * count)
    return DomainRecord(
        tokens,
        domain,
        {
            "own": (noise + apart * domain).reshape(-1, 1, 1),
            "token": (tokens / 10).reshape(-1, 1, 1),
            "still": np.ones((2 * count, 1, 1)),
        },
    )


def test_signals_that_keep_domains_apart_are_found_and_those_that_follow_the_token_are_not() -> None:
    random = np.random.default_rng(0)
    found = distances(plant(random, apart=1.5))
    assert found["own"]["distance"] == [pytest.approx(1.5, abs=0.1)]
    assert found["own"]["same_tokens"] == [pytest.approx(1.5, abs=0.1)]
    assert found["token"]["distance"][0] > 0.5
    assert found["token"]["same_tokens"] == [pytest.approx(0, abs=1e-9)]
    assert found["still"]["distance"] == [0]


def test_a_domain_is_read_from_signals_that_hold_it_and_not_from_those_that_do_not() -> None:
    random = np.random.default_rng(0)
    apart, alike = plant(random, 1.5), plant(random, 0.0)
    one, many = (read_out(apart, plant(random, 1.5), stretch) for stretch in STRETCHES)
    assert 0.75 < one["signals"] < 0.9  # normal, 1.5 deviations apart, with what the token says
    assert many["signals"] > 0.99
    blind = DomainRecord(alike.tokens, alike.domain, {"own": alike.signals["own"]})
    fresh = plant(random, 0.0)
    tried = DomainRecord(fresh.tokens, fresh.domain, {"own": fresh.signals["own"]})
    found = read_out(blind, tried, 1)
    assert found["signals"] == pytest.approx(0.5, abs=0.03)
    assert found["tokens"] == pytest.approx(0.5 + 1 / 6, abs=0.02)  # a third of one domain has ids of its own
    assert found["recent"] > 0.99  # but hardly ever a stretch of 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    tasks = ["calm", "loud"]
    prepare(write_texts(folder, 0, 400), folder / "data", vocab_size=280, tasks=tasks, workers=1)
    prepare(write_texts(folder, 500, 60), folder / "valid", tokenizer=str(folder / "data"), tasks=tasks, workers=1)
    return folder


def test_both_domains_have_as_many_tokens_in_every_text(texts: Path, tmp_path: Path) -> None:
    made = make_domain_data(tmp_path / "cut", texts / "data", texts / "valid", measured_tokens=300)
    assert made.names == ("calm", "loud")
    for part in (made.splits.train, made.splits.tuning, made.splits.validation):
        sizes = [sum(end - start for start, end in documents_of(part, name)) for name in made.names]
        assert abs(sizes[0] - sizes[1]) <= 1
        assert sum(sizes) == part.tokens
    first, second = (dataset.read(0, dataset.tokens).tolist() for dataset in (made.first, made.second))
    assert first + second == made.splits.train.read(0, made.splits.train.tokens).tolist()
    decode = made.first.tokenizer().decode
    assert "!" not in decode(first)
    assert "Tom" not in decode(second)
    text = decode(made.splits.train.read(0, made.splits.train.tokens).tolist())
    tuned = documents_of(made.splits.tuning, "calm")
    held = [decode(made.splits.tuning.read(start + 1, end - start - 1).tolist()) for start, end in tuned]
    assert held[:-1]
    assert not any(story in text for story in held[:-1])
    # an epoch of batches holds every token of both once, in an order that seed and step alone decide
    train, context = made.splits.train, 32
    seen = [train.batch(3, step, 1, context) for step in range(train.epoch_windows(context))]
    assert sorted(itertools.chain(*(batch.targets[batch.targets >= 0].tolist() for batch in seen))) == sorted(
        first + second
    )
    again = ncn.TokenDataset.open(train.folder).batch(3, 2, 1, context)
    assert all(a.equal(b) for a, b in zip(again, seen[2], strict=True))


def test_wrong_data_is_one_line_each(texts: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path, 0, 40)
    one = prepare(source[:1], tmp_path / "one", tokenizer=str(texts / "data"), tasks=["calm"], workers=1)
    prepare(source, tmp_path / "none", tokenizer=str(texts / "data"), workers=1)
    assert one.documents == 40
    for data, valid, words in (
        ("one", texts / "valid", "two domains are compared, and the documents in .* belong to 1 tasks"),
        ("none", texts / "valid", "belong to 0 tasks: prepare two sources with --task FIRST --task SECOND"),
        (texts / "data", "one", "must belong to the tasks calm and loud, .* they belong to calm"),
    ):
        with pytest.raises(ncn.UserError, match=words):
            run_domains(tmp_path / "out", data=tmp_path / data, valid=tmp_path / valid, progress=False)
    with pytest.raises(ncn.UserError, match="seeds must be at least 2, not 1"):
        run_domains(tmp_path / "out", data=texts / "data", valid=texts / "valid", seeds=1, progress=False)
    assert not (tmp_path / "out" / "experiment.json").exists()


@pytest.mark.slow
def test_a_whole_study_goes_on_where_it_stopped(texts: Path, tmp_path: Path) -> None:
    settings = [
        "tokens=2000", "d_model=16", "num_layers=2", "num_heads=2", "context_length=32", "batch_size=4", "d_ff=1200",
        "controller.width=8", "controller.hidden=8",
    ]  # fmt: skip
    said: list[str] = []

    def run() -> list[Path]:
        return run_domains(
            tmp_path / "out", data=texts / "data", valid=texts / "valid", settings=settings, seeds=2, workers=2,
            progress=False, say=said.append,
        )  # fmt: skip

    files = run()
    results = json.loads((tmp_path / "out" / "domains.json").read_text())
    assert set(results["both"]) >= {"static", "ncn", "ncn-tasks", "ncn-tasks, wrong"}
    for arm in ("static", "ncn"):
        first, second = (RunFolder.open(tmp_path / "out" / part / arm / "seed-1") for part in ("first", "second"))
        assert second.environment()["start"] is not None
        before = first.summary()["validation_tasks"]["calm"]["validation_bits_per_byte"]
        assert results["curves"][arm][0]["first"][0] == before
        assert len(results["curves"][arm][0]["second"]) > 5
    page = (tmp_path / "out" / "domains.md").read_text()
    assert "Trained on loud after calm, the NCN" in page
    assert all(path.is_file() for path in files)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    run()
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
