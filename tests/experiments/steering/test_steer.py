"""Measuring sliders: an obedient slider is found, one that does nothing is not, and the numbers are what they say."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ncn
import ncn.experiments.steering.run as steering_run
from contracts.variants import SMALL_CONTROLLER, awake, config
from ncn.cli.app import app
from ncn.core.model import ModulatedTransformer
from ncn.data.prepare import prepare
from ncn.experiments.steering.losses import difference, mean_loss, window_losses
from ncn.experiments.steering.obedience import SETTINGS, describe, distinct, resampled_spearman, spearman
from ncn.experiments.steering.run import one_document_a_row, steer
from ncn.inference.decoding import Request, generate_tokens, write
from ncn.inference.evaluate import bits_per_byte, evaluate
from ncn.inference.sampling import Sampling
from ncn.models.saved import save_model
from ncn.steering.attributes import DocumentSliders, write_attributes
from ncn.steering.decoupling import Decoupling

CORPUS = {"long": 1.0, "calm": 0.0, "loud": -0.4}


def test_spearman() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert spearman(one, np.ones(4)) == 0


def planted(slope: float, noise: float = 0.1) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Ranks (attributes, seeds, settings, prompts) of three attributes: one obeys, one does not, one goes against."""
    random = np.random.default_rng(0)
    setting = np.array(SETTINGS)[None, :, None]
    drawn = random.normal(0, noise, (3, 2, len(SETTINGS), 50))
    return np.stack([0.1 + slope * setting + drawn[0], 0.5 + drawn[1], 0.6 - 0.3 * setting + drawn[2]])


def test_a_planted_slider_is_found_and_its_leakage_too() -> None:
    found = describe("long", ["long", "calm", "loud"], planted(0.7), CORPUS)
    assert found["slope"]["low"] < 0.7 < found["slope"]["high"]
    assert found["slope"]["high"] - found["slope"]["low"] < 0.1
    assert 0.85 < found["spearman"]["low"] < found["spearman"]["value"] < found["spearman"]["high"] < 1
    assert found["spearman_of_means"] == pytest.approx(1)
    assert abs(found["leakage"]["calm"]["value"]) < 0.1
    assert found["leakage"]["loud"]["value"] < -0.6
    # of the leakage onto what goes against it in the corpus, its own obedience explains a part
    expected = found["leakage"]["loud"]["value"] + 0.4 * found["spearman"]["value"]
    assert found["leakage"]["loud"]["beyond_corpus"] == pytest.approx(expected)
    assert found["leakage"]["calm"]["beyond_corpus"] == found["leakage"]["calm"]["value"]


def test_two_models_are_compared_on_the_same_prompts() -> None:
    strong, weak = (resampled_spearman(planted(slope)[0]) for slope in (0.7, 0.2))
    assert np.quantile(strong - weak, 0.025) > 0.1
    assert (resampled_spearman(planted(0.7)[0]) == strong).all()


def test_distinct_runs_lie_within_a_story_and_within_so_many_tokens() -> None:
    stories = [[1, 2, 1, 2], [2, 1, 9, 9]]
    assert distinct(stories, 1, 100) == 3 / 8
    assert distinct(stories, 2, 100) == 4 / 6  # 12, 21, 19, 99; none from one story to the next
    assert distinct(stories, 2, 6) == 2 / 4


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("enter", ["controller", "prefix", "embedding"])
def test_stories_written_together_are_those_written_alone(enter: str, guidance: float) -> None:
    kind = "ncn" if enter == "controller" else "static"
    controller = {"sliders": ["calm"], "sliders_enter": enter, "kind": kind}
    torch.manual_seed(1)
    model = awake(config(SMALL_CONTROLLER | controller, cross_documents=False, tie_embeddings=False))
    with torch.no_grad():
        model.head.weight[0] = 0  # a separator is never the likeliest token
    prompts, values = [[0, 3, 4], [0, 5, 6], [0, 7, 2], [0, 8, 8]], [0.8, 0.1, 0.4, 1.0]
    requests = [
        Request(prompt, 27, Sampling(0.0), 9, {"calm": value}, guidance=guidance)
        for prompt, value in zip(prompts, values, strict=True)
    ]
    together = dict(write(one_document_a_row(model), requests, 4))
    lengths = set()
    for number, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
        options: dict[str, Any] = {"sliders": {"calm": value}, "guidance": guidance}
        alone = list(generate_tokens(model, prompt, max_tokens=27, temperature=0.0, stop_id=9, **options))
        assert 0 not in alone
        assert together[number].tokens == alone
        lengths.add(len(alone))
    assert len(lengths) > 1  # some leave the batch before others


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    stories = [f"Tom had {n} cats. " + '"Oh!" he said. ' * (n % 7) + "They ran. " * (n % 5) for n in range(60)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare([str(folder / "text.txt")], folder / "data", vocab_size=300)
    write_attributes(folder / "data")
    return folder / "data"


def small(**controller: Any) -> ModulatedTransformer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": 300, "context_length": 40, "controller": controller or None}
    return ModulatedTransformer(ncn.NCNConfig.preset("mini", d_model=32, num_layers=2, **settings)).eval()


def obedient() -> ModulatedTransformer:
    """A model whose slider `length` raises the separator's logit when it is low, and lowers it when it is high."""
    model = small(sliders=["length"], sliders_enter="embedding", kind="static", taps=[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.weight", "ffn.down.weight")):
                parameter.zero_()
        model.embedding.weight[:, 0] = 0
        model.embedding.weight[:, 1] = 1  # keeps the norm where it is, and does the same to all logits
        model.embedding.weight[model.config.separator_id, 0] = 1.5
        model.slider_embedding.weight.zero_()
        model.slider_embedding.weight[0] = torch.tensor([-0.2, 0.33])
    return model


def test_an_obedient_model_is_told_from_one_that_does_not_listen(data: Path, tmp_path: Path) -> None:
    opened = ncn.TokenDataset.open(data)
    deaf = small(sliders=["length"])
    plain = small()
    models = {"obedient": obedient(), "deaf": deaf}
    judge = (plain, opened.tokenizer())
    found = steer(
        models, opened.tokenizer(), opened, tmp_path, without={"plain": plain}, judge=judge, prompts=5, seeds=2,
        guidances=[1.0, 2.0], batch_size=16,
    )  # fmt: skip
    results = found.results
    own, other = (results["models"][name]["sliders"]["length"] for name in models)
    assert own["1"]["spearman"]["low"] > 0.3
    assert own["1"]["spearman_of_means"] > 0.9
    assert own["1"]["cut"][0] < own["1"]["cut"][-1]
    # guidance doubles what the slider adds to the separator's logit, which is 0 when it is unset
    assert sum(own["2"]["cut"]) < sum(own["1"]["cut"])
    # before training a slider does nothing, and the same numbers are drawn at every value
    for guidance in ("1", "2"):
        assert other[guidance]["spearman"]["value"] == pytest.approx(0, abs=1e-9)
        assert other[guidance]["slope"]["value"] == pytest.approx(0, abs=1e-9)
        assert len(set(other[guidance]["bits_per_byte"])) == 1
    assert other["1"]["first_minus_this"]["value"] == pytest.approx(own["1"]["spearman"]["value"])
    assert other["1"]["first_minus_this"]["low"] > 0.3
    loss = results["models"]["deaf"]
    assert loss["loss"]["right"] == loss["loss"]["unset"] == loss["loss"]["wrong"]
    assert loss["unset_against"]["plain"] == {"value": 0, "low": 0, "high": 0}  # the same initial weights
    assert results["models"]["obedient"]["right_against_unset"]["value"] != 0
    long = [document for document in documents(opened) if len(document) > 8]
    texts = [opened.tokenizer().decode(document[1:]) for document in long[:: len(long) // 5][:5]]
    assert results["real"]["bits_per_byte"] == pytest.approx(bits_per_byte(*judge, texts))
    names = sorted(path.name for path in found.save(tmp_path))
    assert names == ["compare.png", "steer.html", "steer.json", "steer.md", "steer.png"]
    page = (tmp_path / "steer.md").read_text()
    assert "| obedient | all input embeddings | static |" in page
    for section in re.findall(r"\n\n((?:\|.*\n)+)", page):
        assert len({line.count("|") for line in section.splitlines()}) == 1


def documents(dataset: ncn.TokenDataset) -> list[list[int]]:
    bounds = [*dataset.document_starts().tolist(), dataset.tokens]
    return [dataset.read(a, b - a).tolist() for a, b in itertools.pairwise(bounds)]


def test_what_is_measured_is_kept_and_goes_on_after_a_kill(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ncn.TokenDataset.open(data)
    model = small(sliders=["length", "dialogue"])

    def measured(folder: Path, **options: Any) -> dict[str, Any]:
        results = steer({"model": model}, opened.tokenizer(), opened, folder, prompts=3, seeds=1, **options).results
        return {name: part for name, part in results.items() if name != "environment"}

    whole = measured(tmp_path / "whole")
    original, calls = steering_run.write, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(steering_run, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "parts")
    kept = sorted(path.name for path in (tmp_path / "parts" / "measured").iterdir())
    assert kept == ["model.length.1.0.safetensors", "model.loss.safetensors"]
    assert measured(tmp_path / "parts") == whole
    assert len(calls) == 3  # the first slider was not written again
    assert measured(tmp_path / "parts") == whole
    assert len(calls) == 3
    more = steer({"model": model}, opened.tokenizer(), opened, tmp_path / "parts", prompts=3, seeds=2).results
    assert more["seeds"] == 2
    assert len(calls) == 5  # a second seed adds its own stories to those that there are
    assert measured(tmp_path / "parts", temperature=0.5) != whole  # other settings are measured again
    assert len(calls) == 7
    (tmp_path / "parts" / "measured" / "model.loss.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ncn.UserError, match=r"model\.loss\.safetensors cannot be read .*; remove it"):
        measured(tmp_path / "parts")


def sliders_of(requests: list[Request]) -> torch.Tensor:
    """Those of each request, NaN where unset; the stories' own beginnings are left out of what is measured."""
    for request in requests:
        object.__setattr__(request, "prompt", request.prompt[:1])
    return torch.tensor([[row.sliders.get(name, math.nan) for name in ("length", "dialogue")] for row in requests])


def test_the_other_sliders_can_be_held(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, model = ncn.TokenDataset.open(data), small(sliders=["length", "dialogue"])
    given: list[torch.Tensor] = []

    def recorded(model: Any, requests: list[Request], rows: int) -> Any:
        given.append(sliders_of(requests))
        return ((number, SimpleNamespace(tokens=[1, 2])) for number in range(len(requests)))

    monkeypatch.setattr(steering_run, "write", recorded)
    for others in (None, 0.5):
        steer({"model": model}, opened.tokenizer(), opened, tmp_path, prompts=1, seeds=1, others=others)
    assert all(sliders[:, 0].tolist() == pytest.approx(SETTINGS) for sliders in given[::2])
    assert given[0][:, 1].isnan().all()
    assert given[1][:, 0].isnan().all()
    assert (given[2][:, 1] == 0.5).all()
    assert (given[3][:, 0] == 0.5).all()


def test_the_other_sliders_can_be_moved_such_that_their_attributes_stay(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, model = ncn.TokenDataset.open(data), small(sliders=["length", "dialogue"])
    given: list[torch.Tensor] = []

    def recorded(model: Any, requests: list[Request], rows: int) -> Any:
        given.append(sliders_of(requests))
        longer, louder = ((given[-1] @ torch.tensor(mix)).tolist() for mix in ([0.7, 0.3], [0.2, 0.8]))
        words = [round(5 + 25 * value) for value in longer]
        quotes = [round(5 * count * 0.4 * value) for count, value in zip(words, louder, strict=True)]
        texts = ["word " * count + '"' + "x" * size + '"' for count, size in zip(words, quotes, strict=True)]
        written = [opened.tokenizer().encode(text) for text in texts]
        return ((number, SimpleNamespace(tokens=tokens)) for number, tokens in enumerate(written))

    monkeypatch.setattr(steering_run, "write", recorded)

    def measured(folder: str, **options: Any) -> dict[str, Any]:
        found = steer({"model": model}, opened.tokenizer(), opened, tmp_path / folder, prompts=1, seeds=1, **options)
        found.save(tmp_path / folder)
        return found.results

    plain = measured("plain", others=0.5)
    slopes = {name: plain["models"]["model"]["sliders"][name]["1"]["slope"]["value"] for name in ("length", "dialogue")}
    assert min(slopes.values()) > 0.1
    path = tmp_path / "plain" / "steer.json"
    mixed = measured("mixed", decouple=path)
    decoupling = Decoupling.read(path)
    assert mixed["others"] == 0.5
    assert mixed["mixes"] == {"1": decoupling.mix.tolist()}
    wanted = np.array([[value, 0.5] for value in SETTINGS])
    torch.testing.assert_close(given[2].double(), torch.from_numpy(decoupling.settings(wanted)), rtol=0, atol=1e-6)
    assert given[2][:, 0].tolist() == pytest.approx(SETTINGS)
    assert len(set(given[2][:, 1].tolist())) > 3
    page = (tmp_path / "mixed" / "steer.md").read_text()
    assert "the others moved with it, around the middle, such that their own attributes stay where they are" in page
    assert re.search(r"With guidance 1, a slider .*\n\n\| slider \| length \| dialogue \|", page)
    assert "| dialogue | " + f"{decoupling.mix[0, 1]:+.2f} |".replace("-", "−") in page
    before, after = (
        np.ptp(found["models"]["model"]["sliders"]["length"]["1"]["means"]["dialogue"]) for found in (plain, mixed)
    )
    assert after < 0.7 * before
    wrong: list[tuple[dict[str, ModulatedTransformer], dict[str, Any], str]] = [
        ({"one": small(sliders=["length"])}, {}, "sliders length, dialogue were measured, and this model has length"),
        ({"one": model, "two": model}, {}, "--decouple is of one model: measure it without --against"),
        ({"one": model}, {"others": 0.5}, "--decouple sets the other sliders itself: leave out --others"),
        ({"one": model}, {"folder": path.parent}, "would be written over: give --out another folder"),
    ]
    for models, options, words in wrong:
        with pytest.raises(ncn.UserError, match=words):
            steer(models, opened.tokenizer(), opened, **{"folder": tmp_path, "prompts": 1, "decouple": path, **options})


def test_losses_are_those_of_evaluation_and_differences_have_intervals(data: Path) -> None:
    opened, model = ncn.TokenDataset.open(data), obedient()
    known = DocumentSliders(opened, ("length",))
    losses = window_losses(model, opened, known, 10**9)
    assert mean_loss(losses, "unset") == pytest.approx(evaluate(model, opened).loss, rel=1e-6)
    assert losses["tokens"].sum() == opened.tokens - 1
    assert len({mean_loss(losses, kind) for kind in ("right", "wrong", "unset")}) == 3
    random = np.random.default_rng(0)
    tokens, base = np.full(400, 50.0), random.normal(100, 5, 400)
    found = difference(base + random.normal(0.5, 1, 400), base, tokens)
    assert found["low"] < 0.01 < found["high"]
    assert found["high"] - found["low"] < 0.01
    assert math.isclose(found["value"], 0.01, abs_tol=0.003)


def wrong_uses(data: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    model = small(sliders=["length"])
    yield {"plain": small()}, {}, "plain has no sliders: train one"
    yield {"one": model, "two": small(sliders=["dialogue"])}, {}, "two has the sliders dialogue, and the others"
    yield {"one": small(sliders=["calm"])}, {}, "no attribute 'calm'"
    yield {"one": model}, {"prompts": 100}, "100 prompts were asked for, and the data has 58 documents that long"
    yield {"one": model}, {"guidances": [0.0]}, "a guidance must be above 0"
    yield {"one": model}, {"others": 2.0}, "cannot be set to 2.0: a slider lies from 0 to 1"
    yield {"one": model}, {"without": {"two": awake(config())}}, "two has a vocabulary of 23"


def test_wrong_uses_are_one_line_each(data: Path, tmp_path: Path) -> None:
    opened = ncn.TokenDataset.open(data)
    for models, options, words in wrong_uses(data):
        with pytest.raises(ncn.UserError) as caught:
            steer(models, opened.tokenizer(), opened, tmp_path, **{"prompts": 3, **options})
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_column_of_the_data_is_a_slider_that_cannot_be_measured(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Tom had {n} cats and they all ran home. " * 3, "rating": n}) for n in range(30)]
    (tmp_path / "rated.jsonl").write_text("\n".join(rows))
    prepare([str(tmp_path / "rated.jsonl")], tmp_path / "data", vocab_size=300, sliders=["rating"])
    write_attributes(tmp_path / "data")
    opened = ncn.TokenDataset.open(tmp_path / "data")
    with pytest.raises(ncn.UserError, match=r"slider rating is a column of the data: .* what can is dialogue"):
        steer({"one": small(sliders=["rating"])}, opened.tokenizer(), opened, tmp_path / "out", prompts=3)
    found = steer({"one": small(sliders=["length"])}, opened.tokenizer(), opened, tmp_path / "out", prompts=3, seeds=1)
    assert "rating" not in json.dumps(found.results["models"])


def test_the_command(data: Path, tmp_path: Path) -> None:
    tokenizer = ncn.TokenDataset.open(data).tokenizer()
    for name, model in {"ncn": small(sliders=["length"]), "prefix": obedient()}.items():
        save_model(model, tmp_path / name, tokenizer)
    command = ["steer", str(tmp_path / "ncn"), "--data", str(data), "--out", str(tmp_path / "out"), "--prompts", "2"]
    command += ["--seeds", "1", "--guidance", "1", "--guidance", "2"]
    done = CliRunner().invoke(app, [*command, "--against", str(tmp_path / "prefix")])
    assert done.exit_code == 0, done.output
    assert re.search(r"ncn +length +guidance 2: Spearman \+0\.00", done.output)
    assert str(tmp_path / "out" / "compare.png") in done.output
    assert (tmp_path / "out" / "steer.md").is_file()
    command[command.index("--data") + 1] = str(data.parent / "text.txt")  # prepared, measured and kept
    command[command.index("--out") + 1] = str(tmp_path / "silent")
    for _ in range(2):
        done = CliRunner().invoke(app, [*command, "--no-report"])
        assert done.exit_code == 0, done.output
        assert sorted(path.name for path in (tmp_path / "silent").iterdir()) == ["data", "measured"]
        assert done.output.endswith(f"{tmp_path / 'silent' / 'measured'}\n")
    twice = CliRunner().invoke(app, [*command, "--against", str(tmp_path / "ncn")])
    assert twice.exit_code != 0
