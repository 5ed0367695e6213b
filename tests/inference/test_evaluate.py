"""Evaluation agrees with the plainest loop over the same text, and freezing signals does what it says."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.inference.document_losses import DocumentLosses, document_losses
from ncn.inference.evaluate import bits_per_byte, evaluate
from ncn.inference.freezing import causal_value, freezings, signal_means
from ncn.machine.progress import ProgressReport
from ncn.models.saved import load
from tiny import MODEL, prepare_text, recipe, stories


@pytest.fixture
def dataset(valid: Path) -> TokenDataset:
    return TokenDataset.open(valid)


@pytest.fixture
def tokenizer(data: Path) -> Tokenizer:
    return TokenDataset.open(data).tokenizer()


@pytest.fixture
def model(tokenizer: Tokenizer) -> ModulatedTransformer:
    """Random weights everywhere, also in the controller, so that nothing is neutral."""
    model = ModulatedTransformer(NCNConfig.parse(MODEL | {"separator_id": tokenizer.separator_id}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stream(dataset: TokenDataset) -> list[int]:
    """The tokens on disk, read without the class that is used in the package."""
    return list(map(int, np.fromfile(dataset.folder / "shard-00000.bin", "<u2")))


@torch.no_grad()
def by_hand(model: ModulatedTransformer, tokens: list[int], context: int) -> list[list[float]]:
    """Loss of every token but the first, window by window."""
    losses = []
    for start in range(0, len(tokens) - 1, context):
        part = torch.tensor(tokens[start : start + context + 1])
        logits = model(part[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, part[1:], reduction="none").tolist())
    return losses


@pytest.mark.parametrize("context", [None, 7])
def test_loss_is_that_of_a_loop_over_windows(
    model: ModulatedTransformer, dataset: TokenDataset, context: int | None
) -> None:
    windows = by_hand(model, stream(dataset), context or 32)
    losses = list(itertools.chain.from_iterable(windows))
    result = evaluate(model, dataset, context=context, batch_size=5)
    assert result.tokens == dataset.tokens - 1 == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / dataset.text_bytes, rel=1e-5)
    ranges = {"0": (0, 1), "1": (1, 2), "2-3": (2, 4), "4-6" if context else "4-7": (4, 8)}
    ranges |= {} if context else {"8-15": (8, 16), "16-31": (16, 32)}
    assert result.by_position == {
        label: pytest.approx(_mean([loss for window in windows for loss in window[low:high]]), rel=1e-5)
        for label, (low, high) in ranges.items()
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_positions_sum_back_to_the_whole(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    result = evaluate(model, dataset, context=16)
    counts = torch.zeros(16)
    for _, targets in dataset.windows(16, 4):
        counts += (targets != -100).sum(0)
    shares = {
        "0": counts[0],
        "1": counts[1],
        "2-3": counts[2:4].sum(),
        "4-7": counts[4:8].sum(),
        "8-15": counts[8:].sum(),
    }
    total = sum(result.by_position[label] * count.item() for label, count in shares.items())
    assert total / result.tokens == pytest.approx(result.loss, rel=1e-9)


def test_the_batch_size_changes_nothing(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    losses = [evaluate(model, dataset, batch_size=size).loss for size in (1, 3, 50)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_a_limit_stops_at_the_end_of_a_batch(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    result = evaluate(model, dataset, batch_size=2, max_tokens=100)
    assert result.tokens == 128
    losses = list(itertools.chain.from_iterable(by_hand(model, stream(dataset), 32)))[:128]
    assert result.loss == pytest.approx(_mean(losses), rel=1e-5)
    bytes_a_token = dataset.text_bytes / (dataset.tokens - 1)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / bytes_a_token)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model: ModulatedTransformer, dataset: TokenDataset, training: bool) -> None:
    model.train(training)
    evaluate(model, dataset, max_tokens=10)
    assert model.training is training
    with pytest.raises(UserError):
        evaluate(model, dataset, context=33)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_context_beyond_the_models_is_refused(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match="33 tokens do not fit into the model's context of 32"):
        evaluate(model, dataset, context=33)


def test_data_of_a_larger_vocabulary_is_refused(dataset: TokenDataset) -> None:
    small = ModulatedTransformer(NCNConfig.parse(MODEL | {"vocab_size": 290}))
    with pytest.raises(UserError, match="a vocabulary of 300, the model one of 290; prepare the data with the model's"):
        evaluate(small, dataset)


@pytest.mark.parametrize("signals", [["gain", "precision", "ffn_gate", "head_gate"], ["residual_mix", "norm_film"]])
def test_frozen_at_neutral_is_the_backbone_alone(
    signals: list[str], model: ModulatedTransformer, dataset: TokenDataset
) -> None:
    model = ModulatedTransformer(model.config.override(controller={"signals": signals}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    baseline = ModulatedTransformer(model.config.override(controller=None))
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("controller.")})
    neutral = causal_value(model, dataset)["all"]["neutral"]
    assert neutral == evaluate(baseline, dataset)
    assert abs(neutral.loss - evaluate(model, dataset).loss) > 1e-3


def test_causal_value_freezes_each_signal_and_all(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    found = causal_value(model, dataset)
    assert list(found) == ["all", "gain", "precision", "ffn_gate", "head_gate"]
    assert all(list(kinds) == ["neutral", "mean"] for kinds in found.values())
    means = signal_means(model, dataset)
    assert found["gain"]["mean"] == evaluate(model, dataset, frozen={"gain": means["gain"]})
    losses = {value.loss for kinds in found.values() for value in kinds.values()}
    assert len(losses) == 10


def test_a_bar_is_moved_on_by_every_token_of_every_pass(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    bar = ProgressReport("evaluate", 0, enabled=False)
    evaluate(model, dataset, batch_size=3, bar=bar)
    assert bar.read == dataset.tokens - 1
    causal_value(model, dataset, bar=bar)
    assert bar.read == (1 + 2 * len(freezings(model))) * (dataset.tokens - 1)


def test_the_means_are_those_of_the_windows_that_are_evaluated(
    model: ModulatedTransformer, dataset: TokenDataset
) -> None:
    means = signal_means(model, dataset, context=8)
    expected = evaluate(model, dataset, context=8, frozen=means)
    assert causal_value(model, dataset, context=8)["all"]["mean"].loss == expected.loss
    assert not torch.equal(means["gain"], signal_means(model, dataset)["gain"])


def test_the_mean_is_over_the_tokens_of_the_text(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    tokens = stream(dataset)
    seen: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(tokens) - 1, 32):
        part = torch.tensor([tokens[start : start + 33][:-1]])
        with torch.no_grad():
            signals = model(part, output_signals=True).signals
        for name, signal in signals.items():
            seen.setdefault(name, []).append(signal[0])
    for name, mean in signal_means(model, dataset, batch_size=3).items():
        torch.testing.assert_close(mean[0, 0], torch.cat(seen[name]).mean(0), rtol=1e-5, atol=1e-6)


def test_one_signal_is_all_of_them(dataset: TokenDataset) -> None:
    controller = MODEL["controller"] | {"signals": ["gain"]}
    assert list(causal_value(ModulatedTransformer(NCNConfig.parse(MODEL | {"controller": controller})), dataset)) == [
        "all"
    ]


@torch.no_grad()
def nats_of_text(model: ModulatedTransformer, ids: list[int]) -> float:
    sequence = torch.tensor(ids)
    return F.cross_entropy(model(sequence[None, :-1]).logits[0], sequence[1:], reduction="sum").item()


def test_bits_per_byte_counts_utf8_bytes(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    texts = ["The cat sat.", "Zoë's 猫 🐈", "", "a"]
    nats = sum(nats_of_text(model, [tokenizer.separator_id, *tokenizer.encode(text)]) for text in texts if text)
    size = 12 + len("Zoë's ") + 1 + 3 + 1 + 4 + 1  # ë has two bytes, 猫 three, 🐈 four
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_long_text_is_read_in_overlapping_windows(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    text = stories(0, 400)
    ids = [tokenizer.separator_id, *tokenizer.encode(text)]
    assert len(ids) > 100
    # the first window scores all 32 of its targets, each later one the 16 that follow, with 16 tokens or more before
    nats, scored = nats_of_text(model, ids[:33]), 32
    while scored < len(ids) - 1:
        end = min(len(ids) - 1, scored + 16)
        window = torch.tensor(ids[end - 32 : end + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="none")[-(end - scored) :].sum().item()
        scored = end
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_many_texts_are_one_text_of_all_their_bytes(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    texts = [stories(start, start + 30 + start // 9) for start in range(0, 2000, 90)]
    sizes = [len(text.encode()) for text in texts]
    alone = [bits_per_byte(model, tokenizer, [text]) for text in texts]
    expected = sum(bits * size for bits, size in zip(alone, sizes, strict=True)) / sum(sizes)
    assert bits_per_byte(model, tokenizer, iter(texts)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_nothing_to_measure(model: ModulatedTransformer, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(UserError, match="the texts are empty: there is nothing to measure"):
        bits_per_byte(model, tokenizer, texts)


def test_a_lone_string_is_not_a_list_of_texts(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="give a list of texts"):
        bits_per_byte(model, tokenizer, "a story")


def test_training_has_made_the_model_better(finished: Path, dataset: TokenDataset, tokenizer: Tokenizer) -> None:
    trained, _ = load(finished)
    fresh = ModulatedTransformer(trained.config)
    assert evaluate(trained, dataset).loss < evaluate(fresh, dataset).loss - 0.5
    text = stories(20_000, 21_000)
    assert bits_per_byte(trained, tokenizer, [text]) < bits_per_byte(fresh, tokenizer, [text])


def test_a_diverged_model_has_a_loss_and_no_traceback(tmp_path: Path, data: Path, model: ModulatedTransformer) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(1e4)
    dataset = prepare_text(tmp_path / "short", stories(0, 300), tokenizer=str(data))
    assert evaluate(model, dataset).perplexity > 1e300


def test_the_documents_add_up_to_the_whole(data: Path, tmp_path: Path) -> None:
    dataset = TokenDataset.open(data)
    model = ModulatedTransformer(recipe().model.override(vocab_size=dataset.vocab_size))
    whole, documents = evaluate(model, dataset), document_losses(model, dataset, batch_size=3)
    assert documents.nats.shape == documents.tokens.shape == documents.bytes.shape == (dataset.documents,)
    assert documents.tokens.sum() == whole.tokens == dataset.tokens - 1
    assert documents.bytes.sum() == dataset.text_bytes
    assert documents.loss == pytest.approx(whole.loss, rel=1e-6)
    assert documents.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)
    documents.save(tmp_path / "documents.safetensors")
    again = DocumentLosses.load(tmp_path / "documents.safetensors")
    assert all((getattr(again, name) == value).all() for name, value in vars(documents).items())


def test_each_document_has_its_own_losses(data: Path) -> None:
    """Token by token: a document owns the tokens after its separator, up to the separator that ends it."""
    dataset = TokenDataset.open(data)
    model = ModulatedTransformer(recipe().model.override(vocab_size=dataset.vocab_size))
    expected, document = [0.0] * dataset.documents, -1
    for inputs, targets in dataset.windows(32, 1):
        losses = model.token_losses(inputs, targets)
        for token, target, loss in zip(inputs[0].tolist(), targets[0].tolist(), losses[0].tolist(), strict=True):
            if target != -100:
                document += token == dataset.separator_id
                expected[document] += loss
    assert document_losses(model, dataset).nats.tolist() == pytest.approx(expected, rel=1e-5)


def test_where_no_documents_were_measured_there_are_none_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"documents\.safetensors is missing"):
        DocumentLosses.load(tmp_path / "documents.safetensors")
