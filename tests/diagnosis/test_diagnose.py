"""The verdict is right on controllers whose nature is known; the record, the page and the command are what they say."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ncn
from controllers import (
    CONTEXT,
    VOCABULARY,
    build,
    constant,
    frozen_at_neutral,
    knows_the_position,
    knows_the_token,
    language,
    local,
    networks,
    reads_the_context,
)
from ncn.cli import main
from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.freezing import causal_value
from ncn.diagnosis.homeostasis import over_training
from ncn.diagnosis.readers import reader_of
from ncn.diagnosis.record import choose_texts, collect, read_texts
from ncn.errors import UserError
from ncn.inference.evaluate import evaluate
from ncn.models import published
from ncn.models.saved import save_model
from ncn.statistics.resampling import Resampling
from ncn.training.run_folder import RunFolder
from tiny import MODEL, prepare_text, stories


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return language()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (frozen_at_neutral, "nothing", "does nothing"),
        (constant, "constant", "the same for every token"),
        (knows_the_token, "token", "only knows which token it stands on"),
        (knows_the_position, "position", "only knows the position"),
        (reads_the_context, "context", "reads the context"),
        (local, "context", "reads the context"),
    ],
)
def test_the_verdict_on_a_controller_of_known_nature(
    make: Callable[[], ModulatedTransformer], kind: str, words: str, documents: list[list[int]]
) -> None:
    found = ncn.diagnose(make(), documents)
    assert found.results["verdict"]["kind"] == kind
    assert words in found.verdict[0]
    assert found.results["causality"]["causal"]
    if kind == "nothing":
        assert found.results["causal_value"]["all"]["neutral"]["value"] == 0
        assert found.results["explained"] == {}
    if kind == "constant":
        costs = found.results["causal_value"]["all"]
        assert abs(costs["neutral"]["value"]) > 0.01
        assert costs["layer_mean"]["value"] == pytest.approx(0, abs=1e-5)
        assert costs["shuffled"]["value"] == 0


def test_a_signal_that_adds_is_neutral_at_zero(documents: list[list[int]]) -> None:
    asleep = ncn.diagnose(build(signals=("residual_mix", "gain")), documents)
    assert asleep.results["verdict"]["kind"] == "nothing"
    assert asleep.results["homeostasis"]["signals"]["residual_mix"]["saturation"]["value"] == 0
    awake = build(signals=("residual_mix",), phasic_kernel=4)
    networks(awake)
    found = ncn.diagnose(awake, documents).results
    assert found["verdict"]["kind"] == "context"
    assert abs(found["causal_value"]["all"]["neutral"]["value"]) > 0.001
    assert found["homeostasis"]["signals"]["residual_mix"]["neutral"] == 0


def test_only_the_signal_that_moves_is_said_to_move(documents: list[list[int]]) -> None:
    model = build(signals=("gain", "ffn_gate"), phasic_kernel=4)
    (network,) = networks(model)
    with torch.no_grad():  # outputs are gain and ffn_gate of layer 0, then of layer 1
        network.output.weight[1::2] = 0
    verdict = ncn.diagnose(model, documents).results["verdict"]
    assert verdict["signals"]["gain"].startswith("reads the context")
    assert verdict["signals"]["ffn_gate"].startswith("sits at neutral")
    assert any("holding ffn_gate at neutral costs nothing" in sentence for sentence in verdict["sentences"])


def test_a_controller_that_moves_but_changes_nothing_is_decoration(documents: list[list[int]]) -> None:
    model = reads_the_context()
    with torch.no_grad():  # nothing of any layer reaches the residual stream
        for layer in model.layers:
            layer.attention.output.weight.zero_()
            layer.ffn.down.weight.zero_()
    verdict = ncn.diagnose(model, documents).results["verdict"]
    assert verdict["kind"] == "context"
    assert "decoration" in verdict["sentences"][1]


def test_a_model_without_signals_is_refused_in_one_line(documents: list[list[int]]) -> None:
    model = ModulatedTransformer(NCNConfig.parse(MODEL | {"controller": None}))
    with pytest.raises(UserError, match="has no controller, so there are no signals to diagnose") as refusal:
        ncn.diagnose(model, documents)
    assert "\n" not in str(refusal.value)


def test_the_published_kind_is_diagnosed_and_called_not_causal() -> None:
    path = Path(__file__).parents[1] / "fixtures" / "published_ncn_small.safetensors"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = published.load(weights, json.loads(file.metadata()["config"]))
    rng = np.random.default_rng(0)
    size, length = model.config.vocab_size, min(model.config.max_position_embeddings, 24)
    found = ncn.diagnose(model, [rng.integers(0, size, length).tolist() for _ in range(12)])
    assert not found.results["causality"]["causal"]
    assert found.results["causality"]["change_from_later_token"]["signals"] > 1e-4
    assert any("not causal" in sentence for sentence in found.verdict)
    assert found.results["signals"] == ["gain", "precision", "ffn_gate"]
    # frozen at neutral it is a model without signals: by hand, through the names of its controller's outputs
    costs = found.results["causal_value"]
    assert costs["all"]["neutral"]["value"] != 0
    assert model(torch.zeros(1, 1, dtype=torch.int64)).signals["gain"].std() > 0  # nothing is left behind


# The record


def test_the_record_is_what_the_model_does_text_by_text() -> None:
    model = reads_the_context()
    documents = [ids[: 15 + number] for number, ids in enumerate(language(12))]
    reader = reader_of(model)
    texts = choose_texts(documents, CONTEXT, 10_000)
    record = collect(reader, texts, batch_size=5)
    start = 0
    for number, ids in enumerate(documents):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_signals=True)
        part = slice(start, start := start + len(ids))
        assert record.tokens[part].tolist() == ids
        assert set(record.document[part]) == {number}
        assert record.position[part].tolist() == list(range(len(ids)))
        nats = torch.nn.functional.cross_entropy(output.logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        np.testing.assert_allclose(record.surprisal[part][1:], nats, rtol=1e-4)
        assert np.isnan(record.surprisal[part][0])
        for name, signal in (output.signals or {}).items():
            np.testing.assert_allclose(record.signals[name][part], signal[0], rtol=1e-4)
    assert start == len(record.tokens)


def test_freezing_signals_at_what_they_are_changes_nothing() -> None:
    reader = reader_of(reads_the_context())
    texts = choose_texts([ids[: 15 + number] for number, ids in enumerate(language(12))], CONTEXT, 10_000)
    record = collect(reader, texts)
    again, _ = read_texts(reader, texts, frozen=record.signals, batch_size=3)
    np.testing.assert_allclose(again[1:], record.surprisal[1:], rtol=1e-4)


def test_the_cost_of_freezing_is_that_of_the_evaluation(data: Path, valid: Path) -> None:
    """One long document read in windows is what `evaluate` reads."""
    dataset = TokenDataset.open(valid)
    model = ModulatedTransformer(NCNConfig.parse(MODEL | {"cross_documents": True}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    stream = np.concatenate([inputs[targets != -100] for inputs, targets in dataset.windows(32, 16)])
    usable = len(stream) // 32 * 32
    reader = reader_of(model)
    texts = choose_texts([stream[:usable].tolist()], 32, 10**6)
    record = collect(reader, texts)
    costs = causal_value(reader, texts, record, Resampling(record.unit, 0))
    held = {
        name: torch.ones(1, 1, 1) if record.signals[name].ndim == 2 else torch.ones(1, 1, 1, 1)
        for name in record.signals
    }
    # the evaluation also scores the token after each window, so its windows are read one token shorter
    losses = [
        sum(float(model.token_losses(*batch(text.ids), frozen=frozen).sum()) for text in texts)
        for frozen in (held, None)
    ]
    scored = np.isfinite(record.surprisal).sum()
    assert costs["all"]["neutral"]["value"] == pytest.approx((losses[0] - losses[1]) / scored, rel=1e-3, abs=1e-6)
    assert evaluate(model, dataset, frozen=held).loss - evaluate(model, dataset).loss == pytest.approx(
        costs["all"]["neutral"]["value"], abs=0.05
    )


def batch(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.from_numpy(ids)[None]
    return row[:, :-1], row[:, 1:]


def test_texts_are_spread_over_the_documents_and_long_documents_are_cut() -> None:
    texts = choose_texts([[1] * 100, *([2] * 20 for _ in range(50))], 30, 300)
    assert len({text.document for text in texts}) >= 10
    assert texts[0].begins
    assert all(len(text.ids) <= 30 for text in texts)
    assert sum(len(text.ids) for text in texts) == pytest.approx(300, rel=0.3)
    whole = choose_texts([[1] * 100, [2] * 20], 30, 10**6)
    assert [(len(text.ids), text.document, text.begins) for text in whole] == [
        (30, 0, True), (30, 0, False), (30, 0, False), (20, 1, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("documents", "line"),
    [
        ([[1] * 20], "too little text"),
        ([[1] * 3] * 50, "too little text"),
        ([[1] * 20] * 4, "an interval needs 5"),
        ([[VOCABULARY] * 20] * 9, "use the model's own tokenizer"),
    ],
)
def test_text_that_does_not_do_is_refused(documents: list[list[int]], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ncn.diagnose(reads_the_context(), documents)


# What words say


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return TokenDataset.open(data).tokenizer()


@pytest.fixture(scope="module")
def corpus(data: Path) -> TokenDataset:
    folder = data.with_name("diagnosed")
    return prepare_text(folder, stories(20_000, 70_000), tokenizer=str(data))


def english(make: str, tokenizer: Tokenizer) -> ModulatedTransformer:
    """A controller over English tokens: "order" sees the last four tokens, "token" the newest one only."""
    controller = {"width": 8, "hidden": 16, "pooling_heads": 2, "phasic_kernel": 4 if make == "order" else 1}
    config = MODEL | {"context_length": 96, "controller": controller, "separator_id": tokenizer.separator_id}
    model = ModulatedTransformer(NCNConfig.parse(config))
    (network,) = networks(model)
    if make == "token":
        with torch.no_grad():
            network.read.weight[network.pools : network.pools + network.width] = 0
    return model


@pytest.fixture(scope="module")
def both(corpus: TokenDataset, tokenizer: Tokenizer) -> dict[str, ncn.Diagnosis]:
    torch.manual_seed(0)
    return {
        make: ncn.diagnose(english(make, tokenizer), corpus, tokenizer, max_tokens=2500, name=make)
        for make in ("order", "token")
    }


def test_the_order_of_words_is_told_apart_only_by_who_sees_it(both: dict[str, ncn.Diagnosis]) -> None:
    for make, found in both.items():
        order = found.results["word_order"]
        assert order["pairs"] >= 30
        assert {signal["separated"] for signal in order["signals"].values()} == {make == "order"}
    # the same token at the same place: whoever sees one token only sees no difference at all
    assert all(signal["last"]["value"] < 1e-4 for signal in both["token"].results["word_order"]["signals"].values())
    assert [both[make].results["verdict"]["kind"] for make in both] == ["context", "token"]


def test_the_plot_twist_is_scanned_token_by_token(both: dict[str, ncn.Diagnosis], tokenizer: Tokenizer) -> None:
    found = both["order"]
    assert found.scan is not None
    assert "".join(found.scan.tokens) == "Timmy wanted an apple. He looked in the box, but it was empty."
    expected = ncn.scan(english_again := english("order", tokenizer), tokenizer, found.scan.text)
    assert expected.tokens == found.scan.tokens
    assert english_again.config.controller is not None
    assert found.scan.bounds == expected.bounds


def lines_of_a_run(ranks: Sequence[float | None]) -> list[dict[str, Any]]:
    gain = {"mean": 1.0, "spread": 0.1, "saturation": 0.0}
    return [
        {
            "step": step,
            "tokens": 100 * step,
            "signals": {"gain": gain if rank is None else gain | {"effective_rank": rank}},
        }
        for step, rank in enumerate(ranks, 1)
    ]


@pytest.mark.parametrize("ranks", [(None, None, None), (None, 2.5, 1.25), (3.0, 2.5, 1.25)])
def test_the_rank_over_training_is_told_where_the_whole_run_logged_it(
    both: dict[str, ncn.Diagnosis], tmp_path: Path, ranks: Sequence[float | None]
) -> None:
    course = over_training(lines_of_a_run(ranks))
    assert course is not None
    logged = ranks[0] is not None
    assert course["signals"]["gain"].get("effective_rank") == (list(ranks) if logged else None)
    assert course["signals"]["gain"]["spread"] == [0.1, 0.1, 0.1]
    found = both["order"]
    found.results["training"] = course
    page, *_ = found.save(tmp_path)
    ends = "Spread at the end of training: gain 0.100" + logged * "; effective rank: gain 1.2" + ". No signal"
    assert ends in " ".join(page.read_text().split())
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.height == pytest.approx(1184 if logged else 896, abs=2)


def test_what_is_saved_is_a_page_with_all_its_figures(both: dict[str, ncn.Diagnosis], tmp_path: Path) -> None:
    found = both["order"]
    found.results["training"] = over_training(lines_of_a_run([None] * 3))
    page, html, numbers = found.save(tmp_path / "deep" / "folder")
    assert json.loads(numbers.read_text()) == found.results
    text = page.read_text()
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in page.parent.glob("*.png")}
    assert {"causal_value.png", "reactivity.png", "training.png", "plot_twist.png", "word_order.png"} <= pictures
    for name in pictures:
        with Image.open(page.parent / name) as picture:
            assert picture.width >= 1000
    assert text.count("data:image") == 0
    assert html.read_text().count("data:image/png") == len(pictures)
    assert found.verdict[0] in text
    assert "nan" not in text.lower().replace("finan", "")


def test_a_controller_with_nothing_to_show_still_has_a_page(documents: list[list[int]], tmp_path: Path) -> None:
    for number, model in enumerate((frozen_at_neutral(), constant())):
        page, *_ = ncn.diagnose(model, documents).save(tmp_path / str(number))
        text = page.read_text()
        assert "No signal varies" in text or "do not vary at all" in text
        assert "nan" not in text


def test_the_same_seed_gives_the_same_numbers(documents: Sequence[list[int]]) -> None:
    model = reads_the_context()
    one, other = (ncn.diagnose(model, documents, max_tokens=1500).results for _ in range(2))
    assert one == other


# The command


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ncn", "diagnose", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command_reads_a_run_with_its_training_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: Path, valid: Path
) -> None:
    assert command(monkeypatch, finished, "--data", valid, "--out", tmp_path / "made", "--max-tokens", 800) == 0
    results = json.loads((tmp_path / "made" / "diagnosis.json").read_text())
    printed = capsys.readouterr().out
    assert results["verdict"]["sentences"][0] in printed
    assert str(tmp_path / "made" / "diagnosis.html") in printed
    lines = [line for line in RunFolder.open(finished).metrics() if "signals" in line]
    assert results["training"]["step"] == [line["step"] for line in lines]
    assert results["training"]["signals"]["gain"]["spread"][-1] == lines[-1]["signals"]["gain"]["spread"]
    assert results["tokens"] == pytest.approx(800, rel=0.1)


def test_the_command_refuses_a_baseline_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, valid: Path
) -> None:
    tokenizer = TokenDataset.open(data).tokenizer()
    save_model(ModulatedTransformer(NCNConfig.parse(MODEL | {"controller": None})), tmp_path / "plain", tokenizer)
    assert command(monkeypatch, tmp_path / "plain", "--data", valid, "--out", tmp_path / "made") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this model has no controller")
    assert not (tmp_path / "made").exists()
