"""A controller on models of others: exact at the start, causal, the same in every way of running, and gone without a
trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ncn
from ncn import UserError
from retrofits import MODELS, attached, base, ids, wake

pytestmark = pytest.mark.xdist_group("transformers")
EVERY = pytest.mark.parametrize("name", list(MODELS))
EAGER = [pytest.param(name, "eager", torch.float32, id=f"{name}-eager") for name in ("gpt2", "llama", "gemma2")]
HALF = [
    pytest.param(name, attention, torch.bfloat16, id=f"{name}-{attention}-bf16")
    for name, attention in [("gpt2", None), ("llama", "eager"), ("qwen3", None)]
]
EVERY_WAY = pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [*(pytest.param(name, None, torch.float32, id=name) for name in MODELS), *EAGER, *HALF],
)


@torch.no_grad()
def logits(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=input_ids, use_cache=False, **kwargs).logits
    return result


@EVERY
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_at_its_start_a_model_is_its_base_bit_for_bit(name: str, attention: str, dtype: torch.dtype) -> None:
    model = base(name, attention=attention, dtype=dtype)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    before = logits(model, ids()), logits(model, ids(), attention_mask=mask)
    ncn.attach(model, ncn.ControllerConfig(gain_per="sublayer"))
    assert torch.equal(logits(model, ids()), before[0])
    assert torch.equal(logits(model, ids(), attention_mask=mask)[mask.bool()], before[1][mask.bool()])


def traces(model: Any) -> dict[str, Any]:
    """All that an attached controller could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "hooks": {path: [dict(getattr(module, hook)) for hook in hooks] for path, module in model.named_modules()},
        "training": {path: module.training for path, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "grads": {path: (parameter.requires_grad, parameter.grad) for path, parameter in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


@EVERY
def test_detached_a_model_is_its_base_with_nothing_left_behind(name: str) -> None:
    model = base(name)
    next(model.parameters()).requires_grad_(False)
    before, said = traces(model), logits(model, ids())
    handle = wake(ncn.attach(model))
    assert not torch.allclose(logits(model, ids()), said)
    assert traces(model) != before
    handle.detach()
    assert torch.equal(logits(model, ids()), said)
    assert traces(model) == before
    with pytest.raises(UserError, match="not attached any more"):
        handle.detach()


@EVERY_WAY
def test_every_signal_of_every_layer_changes_the_output_and_gets_a_gradient(
    name: str, attention: str | None, dtype: torch.dtype
) -> None:
    model, handle = attached(name, attention=attention, dtype=dtype)
    model(input_ids=ids(), use_cache=False)
    for signal in handle.signals.values():
        assert signal.shape[:3] == (2, 12, 3)
        for layer in range(3):
            assert signal[:, :, layer].flatten(0, 1).std(0).min() > 1e-5
    output = model(input_ids=ids(), use_cache=False)
    grads = torch.autograd.grad(output.logits.log_softmax(-1)[..., 5].sum(), list(handle.signals.values()))
    for signal, grad in zip(handle.signals, grads, strict=True):
        strength = grad.abs().unflatten(2, (3, 1)).flatten(3).amax(-1).flatten(0, 1).amax(0)
        assert (strength > 1e-7).all(), (signal, strength)


@EVERY
def test_later_tokens_change_nothing(name: str) -> None:
    model, handle = attached(name)
    one, other = ids(), ids()
    other[:, 8:] = ids(seed=2)[:, 8:]
    first, signals = logits(model, one), handle.signals
    second = logits(model, other)
    assert torch.equal(first[:, :8], second[:, :8])
    assert all(torch.equal(signals[each][:, :8], handle.signals[each][:, :8]) for each in signals)
    assert not torch.equal(first[:, 8:], second[:, 8:])


def test_precision_is_the_temperature_of_attention() -> None:
    """Scaling β equals scaling the queries' projection, which for a Llama without QK-norm is the same temperature."""
    model = base("llama")
    handle = ncn.attach(model, ncn.ControllerConfig(signals=("precision",)))
    with handle.frozen_at({"precision": torch.full((3, 4), 2.0)}):
        sharpened = logits(model, ids())
    handle.detach()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
    assert torch.allclose(sharpened, logits(model, ids()), atol=1e-5)


@EVERY_WAY
def test_decoding_says_what_the_whole_forward_says(name: str, attention: str | None, dtype: torch.dtype) -> None:
    model, handle = attached(name, attention=attention, dtype=dtype)
    within, signals_within = (2e-4, 1e-5) if dtype == torch.float32 else (0.06, 0.02)
    text = ids(20)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(model, text, attention_mask=mask, position_ids=positions)
    signals = handle.signals
    cache, parts, seen = None, [], []
    for begin, end in [(0, 9), (9, 10), (10, 13), (13, 14), (14, 20)]:
        with torch.no_grad():
            output = model(
                input_ids=text[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache,
                position_ids=positions[:, begin:end], use_cache=True,
            )  # fmt: skip
        cache = output.past_key_values
        parts.append(output.logits)
        seen.append(handle.signals)
    real = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=within)
    for each, signal in signals.items():
        assert torch.allclose(torch.cat([part[each] for part in seen], 1)[real], signal[real], atol=signals_within)
    # a padded row is what it is alone
    alone = logits(model, text[:1, 4:])
    assert torch.allclose(whole[:1, 4:], alone, atol=within)
    with handle.disable():  # far from which the controller moved it
        assert (logits(model, text[:1, 4:]) - alone).abs().max() > 5 * within


@EVERY
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 10}],
    ids=["greedy", "beam", "static", "sampling"],
)
def test_generation_from_a_padded_batch_is_that_without_a_cache(name: str, options: dict[str, Any]) -> None:
    model, _ = attached(name)
    text = ids(9)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    text[0, :4] = 0
    made = []
    for extra in (options, {key: value for key, value in options.items() if key != "cache_implementation"}):
        torch.manual_seed(3)
        made.append(
            model.generate(
                text, attention_mask=mask, max_new_tokens=8, use_cache=extra is options, eos_token_id=None, **extra
            )
        )
    assert torch.equal(made[0], made[1])


@EVERY
def test_gradient_checkpointing_keeps_the_gradients_of_passes_side_by_side(name: str) -> None:
    """Two forward passes before one backward pass: a layer computed again must meet the signals of its own pass."""

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, handle = attached(name)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(input_ids=ids(seed=seed), labels=ids(seed=seed), use_cache=False).loss for seed in (1, 2)]
        (losses[0] + 2 * losses[1]).backward()
        assert all(parameter.grad is None for key, parameter in model.named_parameters() if "ncn" not in key)
        return [parameter.grad for parameter in handle.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_reentrant_checkpointing_is_refused() -> None:
    model, _ = attached("llama")
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant"):
        model(input_ids=ids())


def test_disabled_and_frozen_at_neutral_a_model_is_its_base() -> None:
    model, handle = attached("llama")
    awake = logits(model, ids())
    with handle.disable():
        off = logits(model, ids())
    with handle.frozen_at("neutral"):
        neutral = logits(model, ids())
        assert all((signal == 1).all() for signal in handle.signals.values())
    assert torch.equal(logits(model, ids()), awake)
    handle.detach()
    assert torch.equal(off, logits(model, ids()))
    assert torch.equal(neutral, off)
    assert not torch.allclose(off, awake)


def test_frozen_at_their_means_signals_keep_their_level_and_leave_out_padding() -> None:
    model, handle = attached("llama")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    logits(model, ids(), attention_mask=mask)
    expected = {name: signal[mask.bool()].mean(0) for name, signal in handle.signals.items()}
    with handle.frozen_at("mean"):
        logits(model, ids(seed=9))
        for name, signal in handle.signals.items():
            assert torch.allclose(signal, expected[name].expand_as(signal))


@pytest.mark.parametrize("kind", ["static", "local"])
def test_the_control_arms_can_be_attached_too(kind: str) -> None:
    model = base("llama")
    before = logits(model, ids())
    handle = ncn.attach(model, ncn.ControllerConfig(kind=kind))
    assert torch.equal(logits(model, ids()), before)
    varies = (wake(handle).num_parameters() > 0) and kind == "local"
    logits(model, ids())
    assert all((signal.flatten(0, 1).std(0) > 1e-6).all() == varies for signal in handle.signals.values())


@pytest.mark.parametrize(("taps", "pooling"), [((0,), "every"), ((0, 2), "first"), ("every", "every")])
def test_taps(taps: Any, pooling: str) -> None:
    model, handle = attached("qwen3", controller={"taps": taps, "pooling": pooling})
    logits(model, ids())
    assert all(signal.shape[2] == 3 for signal in handle.signals.values())


def refused(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_uses_are_one_line_each() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from ncn.retrofit import FAMILIES, Family

    model, handle = attached("llama")
    assert "has a controller already" in refused(lambda: ncn.attach(model))
    handle.detach()
    assert "no signals yet" in refused(lambda: handle.signals)
    film = ncn.ControllerConfig(signals=("gain", "norm_film"))
    assert "norm_film has no site on a base" in refused(lambda: ncn.attach(model, film))
    mix = ncn.ControllerConfig(signals=("gain", "residual_mix"))
    assert "residual_mix has no site on a base" in refused(lambda: ncn.attach(model, mix))
    prefix = ncn.ControllerConfig(sliders_enter="prefix")
    assert "can only enter the controller" in refused(lambda: ncn.attach(model, prefix))
    assert "not Linear" in refused(lambda: ncn.attach(torch.nn.Linear(1, 1)))
    assert "'sites'" in refused(lambda: handle.still("sites"))
    wrong = Family(**vars(FAMILIES["llama"]) | {"projection": "self_attn.out"})
    text = refused(lambda: ncn.attach(model, family=wrong))
    assert "layer 0 has no module 'self_attn.out'" in text
    before = traces(model)
    ineffective = Family(**vars(FAMILIES["llama"]) | {"projection": "mlp.down_proj"})
    assert "not 4 heads of 8" in refused(lambda: ncn.attach(model, family=ineffective))
    assert traces(model) == before
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2))
    text = refused(lambda: ncn.attach(bloom))
    assert "'bloom'" in text
    assert "Family(decoder, layers" in text


def test_a_norm_behind_a_site_is_found() -> None:
    """Gemma's norm after a sublayer undoes any gain before it: a row that says otherwise is refused."""
    from ncn.retrofit import FAMILIES

    text = refused(lambda: ncn.attach(base("gemma2"), family=FAMILIES["llama"]))
    assert "a norm behind its attention site" in text


def test_a_saved_controller_says_the_same_in_another_process(tmp_path: Path) -> None:
    model, handle = attached("llama")
    said = logits(model, ids())
    handle.save(tmp_path / "controller")
    handle.detach()
    model.save_pretrained(tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "controller").iterdir()) == [
        "controller.json", "controller.safetensors",
    ]  # fmt: skip
    torch.save(said, tmp_path / "said.pt")
    script = """
import sys, torch, ncn
from transformers import AutoModelForCausalLM
base, controller, said, input_ids = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
handle = ncn.load_controller(model, controller)
with torch.no_grad():
    again = model(input_ids=torch.tensor(eval(input_ids)), use_cache=False).logits
torch.testing.assert_close(again, torch.load(said), rtol=0, atol=0)
"""
    words = [str(tmp_path / "base"), str(tmp_path / "controller"), str(tmp_path / "said.pt"), str(ids().tolist())]
    subprocess.run([sys.executable, "-c", script, *words], check=True, timeout=120)


def test_a_controller_of_another_base_is_refused_with_what_differs(tmp_path: Path) -> None:
    _, handle = attached("llama")
    handle.save(tmp_path)
    for model, words in [
        (base("qwen3"), "architecture is llama; this one's is qwen3"),
        (base("llama", num_hidden_layers=2), "number of layers is 3; this one's is 2"),
        (base("llama", hidden_size=64), "width is 32; this one's is 64"),
        (base("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0}), "configuration differs"),
    ]:
        before = traces(model)
        assert words in refused(lambda: ncn.load_controller(model, tmp_path))  # noqa: B023 - called at once
        assert traces(model) == before
    assert "controller.json is missing" in refused(lambda: ncn.load_controller(base("llama"), tmp_path / "none"))
    (tmp_path / "controller.safetensors").write_bytes(b"no tensors")
    assert "is damaged" in refused(lambda: ncn.load_controller(base("llama"), tmp_path))
    content = json.loads((tmp_path / "controller.json").read_text())
    handle.save(tmp_path)
    content["controller"]["hidden"] = 9
    (tmp_path / "controller.json").write_text(json.dumps(content))
    model = base("llama")
    before = traces(model)
    assert "does not hold the controller" in refused(lambda: ncn.load_controller(model, tmp_path))
    assert traces(model) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_lora_on_the_same_model() -> None:
    peft = pytest.importorskip("peft")
    model = base("llama")
    before = logits(model, ids())
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    handle = ncn.attach(lora, freeze_base=False)
    assert torch.equal(logits(lora, ids()), before)
    lora(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    moved = {name.split(".")[-3] for name, value in lora.named_parameters() if value.grad is not None}
    assert {"lora_B", "lora_A"} <= moved
    assert all(value.grad is not None for value in handle.parameters())
    optimizer = torch.optim.SGD([value for value in lora.parameters() if value.requires_grad], lr=1.0)
    optimizer.step()
    both = logits(lora, ids())
    with handle.disable():
        alone = logits(lora, ids())
    assert not torch.allclose(both, alone)
    assert not torch.allclose(alone, before)
    handle.detach()
    assert torch.equal(logits(lora, ids()), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled(name: str) -> None:
    """In a process of its own: the compiler does not go with the shape checks of the tests."""
    script = """
import sys, torch
from retrofits import attached, ids
model, handle = attached(sys.argv[1])
compiled = torch.compile(model)
with torch.no_grad():
    plain, signals = model(input_ids=ids(), use_cache=False).logits, handle.signals
    torch.testing.assert_close(compiled(input_ids=ids(), use_cache=False).logits, plain, rtol=0, atol=1e-4)
for each in signals:
    torch.testing.assert_close(handle.signals[each], signals[each], rtol=0, atol=1e-5)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    subprocess.run([sys.executable, "-c", script, name], check=True, timeout=280, env=environment)


def test_speculative_decoding_crops_the_controllers_memory() -> None:
    model, _ = attached("llama")
    plain = model.generate(ids(rows=1), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assistant = base("llama", num_hidden_layers=1)
    assisted = model.generate(
        ids(rows=1), max_new_tokens=12, do_sample=False, eos_token_id=None, assistant_model=assistant
    )
    assert torch.equal(plain, assisted)


def test_a_cache_that_the_controller_has_not_seen_is_refused() -> None:
    model, handle = attached("llama")
    with handle.disable(), torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has not seen"):
        model(input_ids=ids(1), past_key_values=cache, use_cache=True)


def test_the_file_is_small_and_holds_only_the_controller(tmp_path: Path) -> None:
    _, handle = attached("llama")
    handle.save(tmp_path)
    tensors = load_file(tmp_path / "controller.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == handle.num_parameters()
    assert tensors.keys() == dict(handle.named_parameters()).keys()
