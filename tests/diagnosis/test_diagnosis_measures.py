"""Every measure of a diagnosis, on records with planted effects: it finds what was planted, and only that."""

from dataclasses import replace

import numpy as np
import pytest

from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.events import REACH, event_study, reactivity, word_ends
from ncn.diagnosis.homeostasis import homeostasis
from ncn.diagnosis.record import Record
from ncn.diagnosis.stereotyping import _two_ways, from_first_sentence
from ncn.diagnosis.variance import explained_by_tokens, specialisation
from ncn.statistics.resampling import Resampling


def record_of(signal: np.ndarray, tokens: np.ndarray, length: int = 50, surprisal: np.ndarray | None = None) -> Record:
    """A record of texts of `length` tokens with one signal (tokens, layers[, heads])."""
    count = len(tokens)
    text = np.arange(count) // length
    position = np.arange(count) % length
    nats = np.random.default_rng(9).exponential(size=count) if surprisal is None else surprisal.copy()
    nats[position == 0] = np.nan
    return Record(
        tokens, text, text, position, nats, np.ones(count, bool), {"gain": signal.astype(np.float32)},
        {"gain": 1.0}, {"gain": (0.0, 2.0)},
    )  # fmt: skip


def draws(seed: int, texts: int = 60, length: int = 50, words: int = 40) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, rng.integers(0, words, texts * length)


def test_variance_divides_as_it_was_made() -> None:
    rng, tokens = draws(0, texts=100)
    count = len(tokens)
    layers, sites = np.array([-0.3, 0.0, 0.3]), np.array([-0.1, 0.1])
    alike, apart = 0.2 * rng.standard_normal((count, 1, 1)), 0.15 * rng.standard_normal((count, 3, 2))
    signal = 1 + layers[:, None] + sites + alike + apart
    record = record_of(signal, tokens)
    found = specialisation(record, "gain", Resampling(record.unit, 0))
    assert found is not None
    parts = {"layers": layers.var(), "sites": sites.var(), "tokens_alike": 0.04, "tokens_apart": 0.15**2}
    # the mean over six columns of what is apart is alike by chance
    parts["tokens_alike"] += 0.15**2 / 6
    parts["tokens_apart"] *= 5 / 6
    for part, expected in parts.items():
        share = found["shares"][part]
        assert share["value"] == pytest.approx(expected / sum(parts.values()), abs=0.015)
        assert share["low"] <= share["value"] <= share["high"]
        assert share["high"] - share["low"] < 0.06
    assert found["shares"]["layers"]["p"] == pytest.approx(0.001)
    assert sum(found["shares"][part]["value"] for part in parts) == pytest.approx(1)


def test_each_stage_explains_what_was_planted() -> None:
    rng, tokens = draws(1, texts=200)
    record = record_of(np.zeros((len(tokens), 1)), tokens)
    of_token, of_position = rng.standard_normal(40), rng.standard_normal(50)
    seen = np.zeros(len(tokens))
    for text in range(200):
        part = slice(text * 50, text * 50 + 50)
        seen[part] = np.log1p(np.cumsum(tokens[part] < 4)) - np.log1p(np.arange(1, 51) / 10)
    before = np.roll(tokens, 1)
    parts = [
        of_token[tokens],
        of_position[record.position],
        4 * seen,
        np.random.default_rng(2).standard_normal(40)[before],
    ]
    parts = [part / part.std() for part in parts]
    record = replace(record, signals={"gain": (1 + 0.1 * sum(parts))[:, None].astype(np.float32)})
    found = explained_by_tokens(record, Resampling(record.unit, 0))["gain"]
    for stage in ("identity", "position", "bag"):
        # a bag that is planted through its count follows the position too, so shares may pass between neighbours
        assert found[stage]["value"] == pytest.approx(0.25, abs=0.08)
        assert found[stage]["p"] == pytest.approx(0.001)
    assert found["unexplained"]["value"] == pytest.approx(0.25, abs=0.06)
    assert found["unexplained"]["low"] < found["unexplained"]["value"] < found["unexplained"]["high"]


def test_noise_is_explained_by_nothing() -> None:
    rng, tokens = draws(3)
    record = record_of(1 + 0.1 * rng.standard_normal((len(tokens), 3)), tokens)
    found = explained_by_tokens(record, Resampling(record.unit, 0))["gain"]
    assert found["unexplained"]["value"] == pytest.approx(1, abs=0.02)
    assert all(found[stage]["p"] > 0.01 for stage in ("identity", "position", "bag"))


def test_a_planted_reaction_is_found_where_it_was_planted() -> None:
    rng, tokens = draws(4, texts=100)
    surprisal = rng.exponential(size=len(tokens))
    steps = 0.05 * rng.standard_normal((len(tokens), 2))
    high = surprisal >= np.quantile(surprisal, 0.9)
    after = np.roll(high, 1)
    signal = 1 + steps + 0.1 * after[:, None] * rng.choice((-1, 1), len(tokens))[:, None]
    record = record_of(signal, tokens, surprisal=surprisal)
    study = reactivity(record, None, Resampling(record.unit, 0))["surprise"]
    found = study["signals"]["gain"]
    # the token after the event moves away, and the one after that back again
    assert sorted(np.argsort(found["difference"])[-2:]) == [REACH + 1, REACH + 2]
    assert found["low"][REACH + 1] > 0.2
    assert all(abs(found["difference"][place]) < 0.12 for place in range(REACH))

    signal = 1 + steps + 0.1 * high[:, None] * rng.choice((-1, 1), len(tokens))[:, None]
    record = record_of(signal, tokens, surprisal=surprisal)
    for kind in ("surprise", "surprise_same_token"):
        found = reactivity(record, None, Resampling(record.unit, 0))[kind]["signals"]["gain"]
        assert found["at_event"]["p"] == pytest.approx(0.001)
        assert found["at_event"]["low"] > 0.2
        assert found["ratio"] > 1.3


def test_a_reaction_to_frequency_is_none_to_surprise_once_tokens_are_matched() -> None:
    """Rare tokens are surprising and move the signal; against the same token nothing is left."""
    rng, _ = draws(5)
    tokens = np.minimum(rng.geometric(0.15, 5000), 40)
    surprisal = 0.3 * tokens + rng.exponential(size=5000)
    signal = 1 + (0.02 * tokens + 0.05 * rng.standard_normal(5000))[:, None]
    record = record_of(signal, tokens, surprisal=surprisal)
    study = reactivity(record, None, Resampling(record.unit, 0))["surprise_same_token"]
    assert study["signals"]["gain"]["at_event"]["p"] > 0.01


def test_p_values_are_uniform_where_there_is_nothing() -> None:
    reactions, flips, layers = [], [], []
    for seed in range(60):
        rng, tokens = draws(seed, texts=24, length=30)
        record = record_of(1 + 0.1 * rng.standard_normal((len(tokens), 3)), tokens, length=30)
        resampling = Resampling(record.unit, seed)
        events = rng.random(len(tokens)) < 0.15
        movement = {"gain": np.abs(rng.standard_normal(len(tokens)))}
        study = event_study(record, movement, events, ~events, tokens % 3, resampling)
        assert study is not None
        reactions.append(study["signals"]["gain"]["at_event"]["p"])
        flips.append(resampling.sign_flips(rng.standard_normal(24)))
        found = specialisation(record, "gain", resampling)
        assert found is not None
        layers.append(found["shares"]["layers"]["p"])
    for values in (reactions, flips, layers):
        ranks = np.sort(values)
        distance = np.abs(ranks - (np.arange(60) + 0.5) / 60).max()  # Kolmogorov and Smirnov's; 0.21 is the 1 % point
        assert distance < 0.21


def test_contrast_words_are_found_as_words() -> None:
    tokenizer = Tokenizer.load("gpt2")
    text = "But he had butter. The butler saw it, but then, suddenly, it fell. However"
    ids = np.array([50256, *tokenizer.encode(text)])
    record = record_of(np.zeros((len(ids), 1)), ids, length=len(ids))
    hits = word_ends(record, tokenizer, ("but", "suddenly", "however"))
    assert [label.strip() for label in tokenizer.token_labels(ids[hits].tolist())] == [
        "But",
        "but",
        "suddenly",
        "However",
    ]


def test_collapse_shows_in_rank_saturation_and_closed_gates() -> None:
    rng, tokens = draws(6)
    knob = rng.standard_normal((len(tokens), 1))
    one = record_of(1 + 0.1 * knob * np.array([1, 2, 3, 4]), tokens)
    free = record_of(1 + 0.1 * rng.standard_normal((len(tokens), 4)), tokens)
    stuck = record_of(np.where(rng.random((len(tokens), 4)) < 0.3, 0.001, 1.0), tokens)
    found = [homeostasis(record, Resampling(record.unit, 0))["signals"]["gain"] for record in (one, free, stuck)]
    assert found[0]["effective_rank"]["value"] == pytest.approx(1, abs=1e-3)
    assert found[1]["effective_rank"]["value"] == pytest.approx(4, abs=0.05)
    assert found[1]["saturation"]["value"] == 0
    assert found[2]["saturation"]["value"] == pytest.approx(0.3, abs=0.02)
    assert found[2]["saturation"]["low"] < 0.3 < found[2]["saturation"]["high"]
    gates = replace(
        stuck, signals={"ffn_gate": stuck.signals["gain"]}, neutral={"ffn_gate": 1.0}, bounds={"ffn_gate": (0.0, 1.05)}
    )
    closed = homeostasis(gates, Resampling(gates.unit, 0))["closed"]
    assert [closed[limit][0]["value"] for limit in ("0.5", "0.1", "0.01")] == pytest.approx([0.3] * 3, abs=0.03)


def test_a_bound_beside_neutral_is_no_saturation() -> None:
    rng, tokens = draws(6)
    low = record_of(np.where(rng.random((len(tokens), 4)) < 0.3, 0.999, 0.0), tokens)
    share = replace(low, neutral={"gain": 0.0}, bounds={"gain": (0.0, 1.0)})
    found = homeostasis(share, Resampling(share.unit, 0))["signals"]["gain"]
    assert found["saturation"]["value"] == pytest.approx(0.3, abs=0.02)
    assert found["from_neutral"] == pytest.approx(0.999)


def test_the_bootstrap_interval_has_its_coverage() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values, counts = 1 + rng.standard_normal(40), np.ones(40)
        found = Resampling(np.arange(40), seed).ratio(values, counts)
        hits += found.low <= 1 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("planted", [True, False])
def test_the_first_sentence_predicts_the_rest_only_where_it_was_made_to(planted: bool) -> None:
    tokenizer = Tokenizer.load("gpt2")
    rng = np.random.default_rng(7)
    (stop,) = tokenizer.encode(".")
    words = [tokenizer.encode(f" {word}")[0] for word in ("dog", "cat", "boat", "king", "tree", "cake")]
    texts, means = [], []
    for _ in range(80):
        subject = int(rng.integers(3))
        texts.append([50256, words[subject], *rng.choice(words[3:], 4), stop, *rng.choice(words[3:], 23), stop])
        means.append(subject if planted else rng.integers(3))
    signal = 1 + 0.1 * np.repeat(means, 31)[:, None] + 0.1 * rng.standard_normal((80 * 31, 2))
    record = record_of(signal, np.concatenate(texts), length=31)
    found = from_first_sentence(record, tokenizer, Resampling(record.unit, 0))
    assert found is not None
    r2 = found["signals"]["gain"]["r2"]
    if planted:
        assert r2["value"] > 0.7
        assert r2["p"] == pytest.approx(0.001)
        assert r2["low"] <= r2["value"] <= r2["high"]
        assert found["signals"]["gain"]["between"] == pytest.approx(0.4, abs=0.1)
    else:
        assert r2["value"] < 0.1
        assert r2["p"] > 0.01


@pytest.mark.parametrize(("of_words", "of_frames"), [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0), (0.0, 0.0)])
def test_what_moves_a_text_is_put_down_to_its_words_or_its_task(of_words: float, of_frames: float) -> None:
    rng = np.random.default_rng(8)
    points = 0.3 * rng.standard_normal((10, 4, 12))
    points += of_words * rng.standard_normal((10, 1, 12)) + of_frames * rng.standard_normal((1, 4, 12))
    found = _two_ways(points, Resampling(np.arange(20), 0))
    assert (found["words"]["p"] < 0.01) == (of_words > 0)
    assert (found["frame"]["p"] < 0.01) == (of_frames > 0)
    # two texts with the same words differ by their frames and noise, and the reverse
    assert found["same_words"]["value"] == pytest.approx((2 * of_frames**2 + 2 * 0.09) ** 0.5, rel=0.35)
    assert found["same_frame"]["value"] == pytest.approx((2 * of_words**2 + 2 * 0.09) ** 0.5, rel=0.35)
