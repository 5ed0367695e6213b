"""The model as a transformers model, against the real library: the same numbers, and all that `generate` does."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import ncn.hf
from ncn import store
from ncn.cache import Cache
from ncn.config import NCNConfig
from ncn.errors import UserError
from ncn.hf.cache import HostedCache
from ncn.model import ModulatedTransformer
from ncn.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

# The library takes ten seconds of processor time to import: one worker does it, once.
pytestmark = pytest.mark.xdist_group("transformers")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned positions, swiglu": {"positions": "learned", "activation": "swiglu"},
    "grouped heads, qk norm, untied": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "two taps": {"controller": {"taps": [0, 2]}},
    "two taps, one pools": {"controller": {"taps": [0, 2], "pooling": "first"}},
    "per layer, published maps": {"controller": {"precision_per": "layer", "maps": "published"}},
    "gain per sublayer, no phasic": {"controller": {"gain_per": "sublayer", "phasic": False}},
    "across documents": {"cross_documents": True},
    "across documents, learned, two taps": {
        "cross_documents": True,
        "positions": "learned",
        "controller": {"taps": [0, 1]},
    },
    "static signals": {"controller": {"kind": "static"}},
    "local gates": {"controller": {"kind": "local"}},
    "no controller": {"controller": None},
}
SEPARATOR = 3  # not zero, so that it differs from what padding is filled with


def awake(**overrides: Any) -> ModulatedTransformer:
    """A small model whose signals are far from neutral."""
    sizes = {"vocab_size": 61, "d_model": 32, "num_layers": 3, "num_heads": 4, "context_length": 48}
    torch.manual_seed(1)
    model = ModulatedTransformer(NCNConfig.parse(sizes | {"separator_id": SEPARATOR} | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.startswith("controller.") else 0.15
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def core(request: pytest.FixtureRequest) -> ModulatedTransformer:
    return awake(**request.param)


@pytest.fixture
def model() -> Any:
    return ncn.hf.NCNForCausalLM.of(awake(controller={"taps": [0, 2]}))


def text(tokens: int, batch: int = 1) -> Tensor:
    """Token ids in which document borders occur."""
    ids = torch.randint(4, 61, (batch, tokens), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = SEPARATOR
    ids[:, tokens // 2] = SEPARATOR
    return ids


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    mask = torch.ones_like(ids) if mask is None else mask
    result: Tensor = model.generate(ids, attention_mask=mask, **options)
    return result[:, ids.shape[1] :]


def greedy(core: ModulatedTransformer, ids: Tensor, tokens: int = 12) -> Tensor:
    for _ in range(tokens):
        ids = torch.cat([ids, core(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -tokens:]


def padded_left(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


# Files


def test_a_saved_folder_opens_with_the_auto_class(tmp_path: Path, core: ModulatedTransformer) -> None:
    store.save_model(core, tmp_path, None)

    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert isinstance(opened, ncn.hf.NCNForCausalLM)
    assert list(opened.state_dict()) == list(core.state_dict())
    expected, actual = core(text(20, 2), output_signals=True), opened(text(20, 2), output_signals=True)
    assert torch.equal(actual.logits, expected.logits)
    assert actual.signals.keys() == expected.signals.keys()
    assert all(torch.equal(actual.signals[name], signal) for name, signal in expected.signals.items())
    if expected.signals:
        assert torch.equal(actual.homeostatic_loss, expected.homeostatic_loss)


def test_what_the_library_saves_the_core_loads(tmp_path: Path, core: ModulatedTransformer) -> None:
    ncn.hf.NCNForCausalLM.of(core).save_pretrained(tmp_path / "library")
    store.save_model(core, tmp_path / "core", None)

    loaded = store.load_model(tmp_path / "library")

    assert loaded.config == core.config
    assert torch.equal(loaded(text(20)).logits, core(text(20)).logits)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("library", "core")]
    assert files[0].keys() == files[1].keys()
    config, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("library", "core"))
    assert {name: config.get(name) for name in ours} == ours


def test_the_auto_tokenizer_reads_the_saved_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the dog chased the cat over the hill"] * 3, 280)
    store.save_model(awake(vocab_size=280, separator_id=0), tmp_path, tokenizer)

    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert opened("the cat sat").input_ids[-len(tokenizer.encode("the cat sat")) :] == tokenizer.encode("the cat sat")
    assert opened.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    assert opened.eos_token_id == tokenizer.separator_id


def test_a_model_loads_in_bfloat16_and_onto_a_device_map(tmp_path: Path) -> None:
    core = awake()
    store.save_model(core, tmp_path, None)
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert F.cosine_similarity(low(text(20)).logits.float(), core(text(20)).logits, dim=-1).min() > 0.99

    mapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(mapped(text(20)).logits, core(text(20)).logits)


def test_a_model_builds_on_the_meta_device() -> None:
    config = ncn.hf.NCNConfigForTransformers(ncn=NCNConfig.preset("mini").model_dump())
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == sum(
        p.numel() for p in ModulatedTransformer(config.core).parameters()
    )


def test_a_new_model_starts_neutral() -> None:
    config = ncn.hf.NCNConfigForTransformers(ncn=awake().config.model_dump())
    torch.manual_seed(5)
    built = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(5)
    expected = ModulatedTransformer(config.core)

    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in built.state_dict().items())
    assert all((signal == 1).all() for signal in built(text(9), output_signals=True).signals.values())


def test_tensors_that_a_file_lacks_start_neutral_and_leave_the_others_alone(tmp_path: Path) -> None:
    core = awake()
    store.save_model(core, tmp_path, None)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("controller.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert all((signal == 1).all() for signal in opened(text(9), output_signals=True).signals.values())
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in kept.items())


def test_a_foreign_setting_in_the_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="unknown setting 'num_layer'"):
        ncn.hf.NCNConfigForTransformers(ncn=awake().config.model_dump() | {"num_layer": 3})


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_saved_and_loaded(tmp_path: Path, tied: bool) -> None:
    model = ncn.hf.NCNForCausalLM.of(awake(tie_embeddings=tied))
    before = model(text(9)).logits

    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path)

    assert model(text(9)).logits.shape[-1] == model.config.vocab_size == 70
    assert torch.equal(model(text(9)).logits[..., :61], before)
    assert model.get_output_embeddings().weight is (model.embedding if tied else model.head).weight
    loaded = store.load_model(tmp_path)
    assert loaded.config.vocab_size == 70
    assert torch.equal(loaded(text(9)).logits, model(text(9)).logits)


def test_a_copy_of_a_model_is_independent(model: Any) -> None:
    expected = model(text(9)).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embedding.weight.zero_()
    assert torch.equal(model(text(9)).logits, expected)
    assert (twin(text(9)).logits == 0).all()


# Generation


def test_greedy_decoding_is_the_core_loop(core: ModulatedTransformer) -> None:
    model, prompt = ncn.hf.NCNForCausalLM.of(core), text(10, 2)
    expected = greedy(core, prompt)

    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(generate(model, prompt, use_cache=False), expected)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert torch.equal(generate(model, prompt, prefill_chunk_size=3), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_is_its_rows_one_by_one(core: ModulatedTransformer, cache: str) -> None:
    model = ncn.hf.NCNForCausalLM.of(core)
    lengths = [12, 5, 1]
    ids, mask = padded_left(text(12, 3), lengths)

    together = generate(model, ids, mask, cache_implementation=cache)
    chunked = generate(model, ids, mask, cache_implementation=cache, prefill_chunk_size=5)

    rows = [greedy(core, row[None, -length:]) for row, length in zip(ids, lengths, strict=True)]
    assert torch.equal(together, torch.cat(rows))
    assert torch.equal(chunked, together)


def test_beam_search_needs_no_cache_to_find_the_same(core: ModulatedTransformer) -> None:
    model = ncn.hf.NCNForCausalLM.of(core)
    ids, mask = padded_left(text(10, 2), [10, 6])
    options = {"num_beams": 4, "num_return_sequences": 2}

    without = generate(model, ids, mask, use_cache=False, **options)

    assert torch.equal(generate(model, ids, mask, **options), without)
    assert torch.equal(generate(model, ids, mask, cache_implementation="static", **options), without)


def test_sampling_is_repeatable_and_needs_no_cache(model: Any) -> None:
    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, text(8, 2), do_sample=True, temperature=0.9, top_k=20, **options)

    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(1, use_cache=False))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("variant", ["two taps", "across documents", "learned positions, swiglu"])
def test_speculative_decoding_changes_nothing(variant: str) -> None:
    core = awake(**VARIANTS[variant])
    model, prompt = ncn.hf.NCNForCausalLM.of(core), text(10).repeat(1, 2)
    expected = greedy(core, prompt, 20)
    torch.manual_seed(4)
    assistant = ncn.hf.NCNForCausalLM.of(core)  # nearly the model, so that drafts are accepted and refused
    with torch.no_grad():
        assistant.norm.weight.add_(0.3 * torch.randn(32))

    assert torch.equal(generate(model, prompt, max_new_tokens=20, prompt_lookup_num_tokens=4), expected)
    assert torch.equal(generate(model, prompt, max_new_tokens=20, assistant_model=assistant), expected)


def test_a_cache_follows_through_crop_repeat_select_reorder_and_reset(core: ModulatedTransformer) -> None:
    model = ncn.hf.NCNForCausalLM.of(core)
    ids, wrong = text(20, 2), text(20, 2).flip(1)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.cat([ids[:, :10], wrong[:, :5]], 1), past_key_values=cache)
        cache.crop(-5)
        model(ids[:, 10:12], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 2, 4]))  # rows 0, 0, 1
        cache.reorder_cache(torch.tensor([2, 0, 1]))  # rows 1, 0, 0
        rows = torch.tensor([1, 0, 0])
        actual = model(ids[rows, 12:], past_key_values=cache).logits
        torch.testing.assert_close(actual, core(ids[rows]).logits[:, 12:], atol=1e-4, rtol=1e-4)

        cache.reset()
        again = model(wrong, past_key_values=cache).logits
        torch.testing.assert_close(again, core(wrong).logits, atol=1e-4, rtol=1e-4)


def test_the_state_that_rides_along_is_small(model: Any) -> None:
    cache = transformers.DynamicCache(config=model.config)
    model(text(16), past_key_values=cache)
    state: Cache = cache.layers[0].ncn_state
    assert state.length == 16
    assert not any(name.startswith(("keys", "values")) for name in state._slots)
    assert HostedCache(cache).length == 16


def test_a_second_turn_continues_the_first(model: Any) -> None:
    ids, mask = padded_left(text(12, 2), [12, 7])
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    longer = torch.cat([first.sequences, text(6, 2)], 1)
    longer_mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], 1)
    expected = generate(model, longer, longer_mask)
    assert torch.equal(generate(model, longer, longer_mask, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("across", [True, False])
def test_padding_may_begin_after_a_start_without_any(across: bool) -> None:
    model = ncn.hf.NCNForCausalLM.of(awake(cross_documents=across))
    ids, cache = text(12, 2), transformers.DynamicCache(config=model.config)
    expected = model(ids).logits
    model(ids[:, :8], past_key_values=cache)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 10:] = 0
    actual = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual[0], expected[0, 8:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[1, :2], expected[1, 8:10], atol=1e-4, rtol=1e-4)


def test_embeddings_can_be_given_instead_of_ids(model: Any) -> None:
    ids = text(9, 2)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, greedy(model.core, ids))


def test_text_streams_as_it_is_made_and_through_the_pipeline(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the dog chased the cat over the hill"] * 3, 280)
    store.save_model(awake(vocab_size=280, separator_id=0), tmp_path, tokenizer)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    class Collected(transformers.TextStreamer):  # type: ignore[misc]
        pieces: list[str]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces = [*getattr(self, "pieces", []), text]

    streamer = Collected(auto_tokenizer, skip_prompt=True, skip_special_tokens=False)
    inputs = auto_tokenizer("the cat", return_tensors="pt")
    ids = opened.generate(**inputs, streamer=streamer, max_new_tokens=10, do_sample=False, eos_token_id=None)
    expected = auto_tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    assert len(streamer.pieces) > 1
    assert "".join(streamer.pieces) == expected

    pipeline = transformers.pipeline("text-generation", model=opened, tokenizer=auto_tokenizer, device="cpu")
    options = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    (made,) = pipeline("the cat", generation_config=options, return_full_text=False, skip_special_tokens=False)
    assert made["generated_text"] == expected


# Inputs and outputs


def test_only_the_logits_asked_for_are_made(model: Any) -> None:
    logits = model(text(9)).logits
    torch.testing.assert_close(model(text(9), logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(text(9), logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


def test_signals_come_on_request_only(model: Any) -> None:
    plain, full = model(text(9)), model(text(9), output_signals=True)
    assert "signals" not in plain
    assert full.signals["gain"].shape == (1, 9, 3)
    assert full.signals["precision"].shape == (1, 9, 3, 4)
    assert torch.equal(model(text(9), return_dict=False)[0], plain.logits)


def test_inputs_that_make_no_sense_are_refused(model: Any) -> None:
    ids = text(9)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="got 4 dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="padding inside a sequence"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(UserError, match="token id 61 lies outside the vocabulary of 61"):
        model(ids + 61 - ids.max())
    with pytest.raises(UserError, match="do not fit into the model's context of 48"):
        model(text(49))
    foreign = transformers.DynamicCache(config=model.config)
    foreign.update(torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 5, 8), 0)
    with pytest.raises(ValueError, match="past_key_values holds 5 tokens that this model has not seen"):
        model(ids, past_key_values=foreign)


# Training


def test_labels_give_the_mean_loss_over_the_targets(model: Any) -> None:
    ids, labels = text(9, 2), text(9, 2)
    labels[0, :4] = -100
    logits = model(ids).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    targets = (labels[:, 1:] != -100).sum()

    torch.testing.assert_close(model(ids, labels=labels).loss, losses / targets)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=40).loss, losses / 40)


def test_the_homeostatic_term_joins_the_loss_when_weighed(model: Any) -> None:
    ids = text(10, 2)
    plain = model(ids, labels=ids, output_signals=True)
    model.config.homeostatic_weight = 0.5
    weighed = model(ids, labels=ids)
    torch.testing.assert_close(weighed.loss, plain.loss + 0.5 * plain.homeostatic_loss)
    assert "homeostatic_loss" not in weighed

    # the Trainer adds up the losses of a step's batches: the term must not grow with their number
    halves = [model(row[None], labels=row[None], num_items_in_batch=20) for row in ids]
    signals = [model(row[None], output_signals=True).homeostatic_loss for row in ids]
    model.config.homeostatic_weight = 0.0
    plain_halves = [model(row[None], labels=row[None], num_items_in_batch=20) for row in ids]
    added = sum(half.loss for half in halves) - sum(half.loss for half in plain_halves)
    torch.testing.assert_close(added, 0.5 * sum(signals) / 2)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(core: ModulatedTransformer) -> None:
    model = ncn.hf.NCNForCausalLM.of(core).train()
    model.config.homeostatic_weight = 0.1
    ids, mask = padded_left(text(12, 2), [12, 8])

    def gradients() -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    loss, expected = gradients()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    again, actual = gradients()

    assert len(seen) == 2  # once forward, once more for the backward pass
    assert torch.equal(again, loss)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_the_trainer_trains(tmp_path: Path) -> None:
    core = awake()
    core.reset_parameters()
    model = ncn.hf.NCNForCausalLM.of(core)
    rows = [{"input_ids": row, "labels": row} for row in text(16, 8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=25,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=25,
        dataloader_pin_memory=False,
    )

    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer_loss = trainer.evaluate(rows)["eval_loss"]

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 3.5 < losses[0] < 4.5  # about ln 61, so neither summed nor divided twice over the accumulated batches
    assert losses[-1] < losses[0] - 1
    saved = store.load_model(tmp_path / "checkpoint-25")
    batch = text(16, 8)
    expected = F.cross_entropy(saved(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    assert trainer_loss == pytest.approx(expected, abs=1e-4)
    signals = saved(batch, output_signals=True).signals
    assert any(signal.std() > 1e-3 for signal in signals.values())  # the controller learned too


COMPILED = """
import sys, torch, ncn.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).requires_grad_(False)
compiled = torch.compile(model)
ids, mask = torch.arange(1, 25).view(2, 12), torch.ones(2, 12, dtype=torch.long)
torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
mask[1, :4] = 0
one, other = compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
torch.testing.assert_close(one[mask.bool()], other[mask.bool()], atol=1e-4, rtol=1e-4)
print("the same")
"""


@pytest.mark.slow
def test_a_compiled_forward_gives_the_same(tmp_path: Path) -> None:
    store.save_model(awake(), tmp_path, None)
    # in a process of its own, because the compiler cannot see through the shape checks of the tests
    done = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("the same\n"), done.stderr
