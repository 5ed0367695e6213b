"""Inputs from outside on models of others: unset they add nothing, set they act on their own row, and the same in every
way of running."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ncn
from ncn import UserError
from ncn.data.tokenizer import Tokenizer
from ncn.inference.decoding import Decoder, Request, generate_tokens, write
from ncn.inference.sampling import Sampling
from ncn.retrofit.bases import shape_of
from ncn.retrofit.model import RetrofittedModel
from retrofits import MODELS, attached, base, ids

pytestmark = pytest.mark.xdist_group("transformers")
EVERY = pytest.mark.parametrize("name", list(MODELS))
INPUTS: dict[str, Any] = {"sliders": ("calm", "long"), "tasks": ("tell", "ask"), "instructions": True}


def steered(name: str = "llama", **fields: Any) -> Any:
    return attached(name, controller=INPUTS | fields.pop("controller", {}), **fields)


@torch.no_grad()
def logits(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=input_ids, use_cache=False, **kwargs).logits
    return result


@EVERY
def test_unset_they_add_nothing_and_each_of_them_acts_on_its_row(name: str) -> None:
    model, handle = steered(name)
    plain = logits(model, ids())
    with handle.given():
        assert torch.equal(logits(model, ids()), plain)
    with handle.given(sliders={"calm": math.nan, "long": None}, task=[None, None], instruction=[None, None]):
        assert torch.equal(logits(model, ids()), plain)
    for given in (
        {"sliders": {"calm": [None, 0.9]}},
        {"sliders": torch.tensor([[math.nan, math.nan], [0.2, math.nan]])},
        {"task": [None, "ask"]},
        {"task": torch.tensor([-1, 0])},
        {"instruction": [None, [5, 6, 7]]},
    ):
        with handle.given(**given):
            moved = logits(model, ids())
        assert torch.equal(moved[0], plain[0])
        assert (moved[1] != plain[1]).any(-1).all()
    assert torch.equal(logits(model, ids()), plain)
    with handle.given(sliders={"calm": 0.9}), handle.disable():
        off = logits(model, ids())
    handle.detach()
    assert torch.equal(off, logits(model, ids()))


def test_an_instruction_is_the_mean_of_its_embeddings() -> None:
    model, handle = steered()
    twice, once = [[5, 6, 5, 6], [7]], torch.tensor([[5, 6, -1], [7, -1, -1]])
    with handle.given(instruction=twice):
        expected = logits(model, ids())
    with handle.given(instruction=once):
        torch.testing.assert_close(logits(model, ids()), expected)
    tokenizer = Tokenizer.train(["a calm dog ran after the cat"] * 3, 280)
    model, handle = steered(vocab_size=280)
    with handle.given(instruction=tokenizer.encode("a calm dog")):
        expected = logits(model, ids())
    with handle.given(instruction=" a calm dog\n", tokenizer=tokenizer):
        assert torch.equal(logits(model, ids()), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_generation_from_a_padded_batch_of_settings_is_that_of_each_row(name: str, options: dict[str, Any]) -> None:
    model, handle = steered(name)
    text, mask = ids(9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = text[0, :4] = 0
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    moving = torch.linspace(0, 1, 15)  # goes on at its last value
    moving_rows = torch.stack([moving, 1 - moving])
    settings: dict[str, Any] = {"sliders": {"calm": [0.1, 0.9], "long": moving_rows}, "task": ["ask", None]}
    with handle.given(instruction=[[5, 6], [7]], **settings):
        together = model.generate(text, attention_mask=mask, **common)
        uncached = model.generate(
            text, attention_mask=mask, use_cache=False,
            **{key: value for key, value in common.items() if key != "cache_implementation"},
        )  # fmt: skip
    assert torch.equal(together, uncached)
    with handle.given(sliders={"calm": 0.1, "long": moving_rows[:1]}, task="ask", instruction=[5, 6]):
        first = model.generate(text[:1], attention_mask=mask[:1], **common)
    with handle.given(sliders={"calm": 0.9, "long": moving_rows[1:]}, instruction=[7]):
        second = model.generate(text[1:], **common)
    assert torch.equal(together, torch.cat([first, second]))
    assert not torch.equal(together, model.generate(text, attention_mask=mask, **common))


@pytest.mark.parametrize(("scale", "use_cache"), [(0.0, True), (3.0, True), (1.7, False)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_guidance_leads_away_from_the_text_without_inputs(name: str, scale: float, use_cache: bool) -> None:
    """In the base's own `generate`, for every row of a padded batch, what our own generation writes."""
    model = in_our_manners(name)
    text = ids(9)
    text[0, :4] = 0
    mask = (text != 0).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "use_cache": use_cache}

    def made(**more: Any) -> torch.Tensor:
        with model.handle.given(sliders={"calm": [0.9, 0.1]}):
            found: torch.Tensor = model.base.generate(text, guidance_scale=scale, **options | more)
        return found

    for how in ({"attention_mask": mask}, {}):  # the library finds padding without a mask too
        together = made(do_sample=False, **how)
        for row, (start, value) in enumerate([(4, 0.9), (0, 0.1)]):
            settings: dict[str, Any] = {"sliders": {"calm": value}, "guidance": scale, "temperature": 0.0}
            alone = list(generate_tokens(model, text[row, start:].tolist(), max_tokens=6, **settings))
            assert together[row, 9:].tolist() == alone
    torch.manual_seed(0)
    several = made(do_sample=True, temperature=1e-6, num_return_sequences=2, attention_mask=mask)
    assert torch.equal(several, together.repeat_interleave(2, 0))


def test_guidance_may_stand_in_a_configuration_and_needs_inputs_and_no_beams() -> None:
    from transformers import GenerationConfig

    model, handle = steered()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    asked = GenerationConfig(guidance_scale=3.0, **options)
    plain = model.generate(ids(), guidance_scale=3.0, **options)
    with handle.given(sliders={"calm": 0.9}):
        made = model.generate(ids(), guidance_scale=3.0, **options)
        assert torch.equal(made, model.generate(ids(), generation_config=asked))
        assert torch.equal(
            made, model.generate(input_ids=ids(), guidance_scale=3.0, negative_prompt_ids=ids(), **options)
        )
        assert not torch.equal(made, model.generate(ids(), guidance_scale=3.0, negative_prompt_ids=ids(2), **options))
        with pytest.raises(UserError, match="does not follow beams"):
            model.generate(ids(), guidance_scale=3.0, num_beams=2, **options)
        with pytest.raises(UserError, match="give generate its input_ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids()), guidance_scale=3.0, **options)
    assert asked.guidance_scale == 3
    # where nothing is given the library guides as it always does, away from the end of the prompt
    assert torch.equal(plain, model.generate(ids(), guidance_scale=3.0, negative_prompt_ids=ids()[:, -1:], **options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_keeps_the_inputs_of_passes_side_by_side(name: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, handle = steered(name)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        losses = []
        for value, words in ((0.1, [5, 6]), (0.9, [7])):
            with handle.given(sliders={"calm": value}, task="tell", instruction=words):
                losses.append(model(input_ids=ids(), labels=ids(), use_cache=False).loss)
        (losses[0] + 2 * losses[1]).backward()
        return [parameter.grad for parameter in handle.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)
        assert plain.abs().max() > 0


def test_a_controller_learns_to_obey_on_a_base_that_does_not_change() -> None:
    """A slider that says which token comes next, an instruction that says it too, and the base's own when unset."""
    model, handle = attached("llama", awake=False, controller=INPUTS | {"width": 32, "hidden": 64})
    text = ids(6, rows=2)
    plain = logits(model, text)
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-2)
    given: list[tuple[dict[str, Any], int]] = [
        ({"sliders": {"calm": 0.0}}, 40), ({"sliders": {"calm": 1.0}}, 50),
        ({"instruction": [5, 6]}, 60), ({"instruction": [7, 8]}, 70),
    ]  # fmt: skip
    for _ in range(80):
        unset = model(input_ids=text, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(unset, plain.softmax(-1).flatten(0, 1), reduction="batchmean")
        for inputs, target in given:
            with handle.given(**inputs):
                said = model(input_ids=text, use_cache=False).logits[:, -1]
            loss = loss + F.cross_entropy(said, torch.full((2,), target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for inputs, target in given:
        with handle.given(**inputs):
            assert logits(model, text)[:, -1].argmax(-1).tolist() == [target] * 2


def test_a_saved_controller_keeps_its_inputs(tmp_path: Any) -> None:
    model, handle = steered()
    with handle.given(sliders={"calm": 0.9}, instruction=[5]):
        said = logits(model, ids())
    handle.save(tmp_path)
    again = base("llama")
    loaded = ncn.load_controller(again, tmp_path)
    with loaded.given(sliders={"calm": 0.9}, instruction=[5]):
        assert torch.equal(logits(again, ids()), said)


def in_our_manners(name: str = "llama") -> RetrofittedModel:
    model, handle = steered(name)
    config = ncn.NCNConfig.parse(shape_of(model.config)).override(controller=handle.config)
    return RetrofittedModel(handle, config, name).eval()


def test_our_own_generation_steers_it_too() -> None:
    model = in_our_manners()
    text = [3, 4, 5]

    def made(**options: Any) -> list[int]:
        return list(generate_tokens(model, text, max_tokens=6, temperature=0.0, **options))

    with model.handle.given(sliders={"calm": 0.9}):
        expected = model.base.generate(torch.tensor([text]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert made(sliders={"calm": 0.9}) == expected[0, 3:].tolist()
    assert made(sliders={"calm": 0.9}, guidance=0.0) == made()
    with model.handle.given(instruction=[5, 6], task="ask"):
        expected = model.base.generate(torch.tensor([text]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert made(instruction=[5, 6], task="ask") == expected[0, 3:].tolist()
    sequence = list(text)
    for number in range(6):
        values = torch.full((1, len(sequence), 2), math.nan)
        values[0, :, 0] = torch.tensor([0.0] * 3 + [place / 5 for place in range(1, number + 1)])
        control = ncn.ControlInputs(values)
        sequence.append(int(model(torch.tensor([sequence]), control=control).logits[0, -1].argmax()))
    assert made(sliders={"calm": (0.0, 1.0)}) == sequence[3:]


@torch.no_grad()
def test_its_cache_is_cropped_reordered_and_repeated_whole() -> None:
    model, text, new = in_our_manners(), ids(9, rows=3), ids(2, rows=6, seed=4)
    cache = model.new_cache()
    model(text, cache=cache)
    cache.crop(6)
    model(text[:, 6:7], cache=cache)
    cache.reorder(torch.tensor([2, 0, 0]))
    cache.repeat(2)
    rows = torch.cat([text[[2, 2, 0, 0, 0, 0], :7], new], 1)
    said = model(new, cache=cache).logits
    torch.testing.assert_close(said, model(rows).logits[:, 7:], rtol=0, atol=2e-4)
    assert not torch.allclose(said[1], said[2])
    cache.crop(0)
    torch.testing.assert_close(model(text[:1], cache=cache).logits, model(text[:1]).logits, rtol=0, atol=2e-4)


def test_a_cache_of_our_own_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"with a cache of the base's: make it with model\.new_cache\(\)"):
        in_our_manners()(ids(4), cache=ncn.Cache())


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral", "qwen3"])
def test_rows_that_join_a_batch_write_what_they_write_alone(name: str, guidance: float) -> None:
    model = in_our_manners(name)
    lengths = [3, 12, 5, 1, 9, 4]  # some longer than the windows of layers that look back eight tokens
    requests = [
        Request(
            ids(length, rows=1, seed=number)[0].tolist(), 12 + number, Sampling(1.0, seed=1, choice=number),
            sliders={"calm": number / 5}, guidance=guidance,
        )
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    together = {number: row.tokens for number, row in write(model, requests, 3)}
    alone = [dict(write(model, [request], 1))[0].tokens for request in requests]
    assert [together[number] for number in range(6)] == alone
    decoder = Decoder(model)
    (long,) = decoder.join(requests[1:2])
    for _ in range(10):
        decoder.step()
    (short,) = decoder.join(requests[3:4])
    while decoder.rows:
        decoder.step()
    assert (long.tokens, short.tokens) == (alone[1], alone[3])


def test_padding_that_the_base_can_see_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_our_manners("llama")
    requests = [Request(ids(length, rows=1)[0].tolist(), 12, Sampling(0.0)) for length in (9, 2)]
    alone = [dict(write(model, [request], 1))[0].tokens for request in requests]
    assert [row.tokens for _, row in sorted(write(model, requests, 2), key=lambda found: found[0])] == alone
    monkeypatch.setattr(type(model), "_padding", lambda *_: {"attention_mask": None})
    assert [row.tokens for _, row in sorted(write(model, requests, 2), key=lambda found: found[0])] != alone


def test_a_base_that_caps_its_logits_is_trained_on_capped_ones() -> None:
    model = in_our_manners("gemma2")
    model.base.config.final_logit_softcapping = 2.0  # low, so that it matters
    text, targets = ids(12), ids(12, seed=5)
    targets[0, :4] = -100
    expected = F.cross_entropy(
        model.base(input_ids=text, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    used = [parameter for name, parameter in model.named_parameters() if "external" not in name]
    expected_grads = torch.autograd.grad(expected, used)
    loss, _ = model.loss(text, targets, chunk=5)
    grads = torch.autograd.grad(loss, used)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.token_losses(text, targets).sum(), expected.detach())
    torch.testing.assert_close(model(text).logits, logits(model.base, text))


def test_a_controller_without_inputs_says_so() -> None:
    _, handle = attached("llama")
    for given, words in [
        ({"sliders": {"calm": 0.5}}, "no slider 'calm'; it has none"),
        ({"sliders": torch.zeros(1, 2)}, "this model has 0; train one with"),
        ({"task": "ask"}, "this model has none; train one with"),
        ({"instruction": [5]}, "this model takes none; train with"),
    ]:
        with pytest.raises(UserError, match=words), handle.given(**given):
            pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sliders": {"loud": 0.5}}, "no slider 'loud'; it has calm, long"),
        ({"sliders": {"calm": 1.5}}, "slider calm is 1.5; it must lie from 0 to 1"),
        ({"sliders": torch.tensor([[0.5, -0.5]])}, "slider long is -0.5; it must lie from 0 to 1"),
        ({"sliders": torch.tensor([[0.5]])}, "1 sliders were given, and this model has 2: calm, long"),
        ({"sliders": {"calm": [0.1, 0.2, 0.3]}}, "given for 3 rows, and the batch has 2"),
        ({"sliders": {"calm": [0.1, 0.2], "long": [0.1, 0.2, 0.3]}}, "for 2 rows, and another one for 3"),
        ({"task": "sing"}, "no task 'sing'; it has tell, ask"),
        ({"task": 2}, "task 2 was given; this model has 0 to 1"),
        ({"instruction": "be calm"}, "needs the base's tokenizer"),
        ({"instruction": []}, "the instruction is empty"),
        ({"instruction": " ", "tokenizer": object()}, "the instruction is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # an object's own name differs between processes
)
def test_wrong_inputs_are_one_line_each(given: dict[str, Any], words: str) -> None:
    model, handle = steered()
    with pytest.raises(UserError) as caught, handle.given(**given):
        logits(model, ids())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
