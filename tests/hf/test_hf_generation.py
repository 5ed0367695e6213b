"""All that transformers' `generate` does, with the numbers of the core's own loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ncn.hf
from hf_models import VARIANTS, awake, padded_left, text
from ncn.core.cache import Cache
from ncn.core.model import ModulatedTransformer
from ncn.data.tokenizer import Tokenizer
from ncn.hf.cache import HostedCache
from ncn.models import saved as store

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

# The library takes ten seconds of processor time to import: one worker does it, once.
pytestmark = pytest.mark.xdist_group("transformers")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def core(request: pytest.FixtureRequest) -> ModulatedTransformer:
    return awake(**request.param)


@pytest.fixture
def model() -> Any:
    return ncn.hf.NCNForCausalLM.of(awake(controller={"taps": [0, 2]}))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    mask = torch.ones_like(ids) if mask is None else mask
    result: Tensor = model.generate(ids, attention_mask=mask, **options)
    return result[:, ids.shape[1] :]


def greedy(core: ModulatedTransformer, ids: Tensor, tokens: int = 12) -> Tensor:
    for _ in range(tokens):
        ids = torch.cat([ids, core(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -tokens:]


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
