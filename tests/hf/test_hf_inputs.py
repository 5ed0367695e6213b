"""Inputs from outside through the transformers library: its `generate` and its Trainer do with them what our own model
and our own decoding do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ncn.hf
from contracts.variants import SMALL_CONTROLLER, config
from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.core.types import ControlInputs
from ncn.errors import UserError
from ncn.inference.decoding import generate_tokens
from ncn.models import saved as store

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("transformers")
NAN = math.nan
INPUTS = {"sliders": ["calm", "long"], "tasks": ["tell", "ask"], "instructions": True, "taps": [0, 2]}


def awake(**fields: Any) -> ModulatedTransformer:
    torch.manual_seed(1)
    model = ModulatedTransformer(config(SMALL_CONTROLLER | INPUTS, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if name.startswith("controller.") else 0.15) * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def core() -> ModulatedTransformer:
    return awake()


def text(tokens: int = 9, rows: int = 2) -> Tensor:
    return torch.randint(1, 23, (rows, tokens), generator=torch.Generator().manual_seed(2))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    made: Tensor = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    return made


def test_forward_is_the_core_model_with_the_same_inputs(core: ModulatedTransformer) -> None:
    model, ids = ncn.hf.NCNForCausalLM.of(core), text()
    pooled = core.pool_instruction(torch.tensor([[3, 4], [5, -1]]))
    sliders = torch.tensor([[[0.1, NAN]], [[0.9, 0.5]]])
    expected = core(ids, control=ControlInputs(sliders, torch.tensor([[1], [-1]]), pooled)).logits
    said: list[dict[str, Any]] = [
        {
            "sliders": {"calm": [0.1, 0.9], "long": [None, 0.5]}, "tasks": ["ask", None],
            "instruction_ids": [[3, 4], [5]],
        },
        {
            "sliders": sliders[:, 0], "tasks": torch.tensor([1, -1]),
            "instruction_ids": torch.tensor([[3, 4], [5, core.config.separator_id]]),
        },
    ]  # fmt: skip
    for given in said:
        assert torch.equal(model(ids, **given).logits, expected)
    unset = {"sliders": {"calm": None}, "tasks": [None, -1], "instruction_ids": [None, None]}
    assert torch.equal(model(ids, **unset).logits, core(ids).logits)


@pytest.mark.parametrize("settings", [{"calm": 0.9}, {"calm": 0.0, "long": 1.0}], ids=str)
def test_greedy_is_our_own_decoding(core: ModulatedTransformer, settings: dict[str, float]) -> None:
    model, ids = ncn.hf.NCNForCausalLM.of(core), text(rows=1)
    ours = list(generate_tokens(core, ids[0].tolist(), max_tokens=10, temperature=0.0, sliders=settings))
    assert generate(model, ids, sliders=settings)[0].tolist() == ours
    assert generate(model, ids)[0].tolist() != ours


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}], ids=str
)
def test_a_padded_batch_of_settings_is_its_rows_one_by_one(core: ModulatedTransformer, options: dict[str, Any]) -> None:
    model, ids = ncn.hf.NCNForCausalLM.of(core), text()
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    moving = torch.linspace(0, 1, 14).expand(2, -1) * torch.tensor([[1.0], [0.5]])
    given: dict[str, Any] = {"sliders": {"calm": [0.1, 0.9], "long": moving}, "tasks": ["ask", None]}
    given["instruction_ids"] = torch.tensor([[3, 4], [5, -1]])
    together = generate(model, ids, mask, **given, **options)
    rows = []
    for row, task in enumerate(["ask", None]):
        start = 4 if row == 0 else 0  # places count padding
        alone = {
            "sliders": {"calm": float(given["sliders"]["calm"][row]), "long": moving[row : row + 1, start:]},
            "tasks": task,
            "instruction_ids": [[3, 4], [5]][row],
        }
        rows.append(generate(model, ids[row : row + 1, start:], **alone, **options))
    assert torch.equal(together, torch.cat(rows))
    assert not torch.equal(together, generate(model, ids, mask, **options))
    if "prefill_chunk_size" not in options:
        assert torch.equal(together, generate(model, ids, mask, use_cache=False, **given, **options))


def test_sampling_draws_from_the_steered_model(core: ModulatedTransformer) -> None:
    model, ids = ncn.hf.NCNForCausalLM.of(core), text()

    def sample(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return generate(model, ids, do_sample=True, top_k=0, **options)

    steered = sample(sliders={"calm": 0.9})
    assert torch.equal(steered, sample(sliders={"calm": 0.9}, use_cache=False))
    assert torch.equal(sample(), sample(sliders={"calm": None}))
    assert not torch.equal(steered, sample())


@pytest.mark.parametrize("scale", [0.0, 1.7, 3.0])
def test_guidance_is_our_own(core: ModulatedTransformer, scale: float) -> None:
    model, ids = ncn.hf.NCNForCausalLM.of(core), text()
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    made = generate(model, ids, mask, sliders={"calm": [0.9, 0.2]}, guidance_scale=scale)
    for row, (start, value) in enumerate([(4, 0.9), (0, 0.2)]):
        prompt = ids[row, start:].tolist()
        options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "sliders": {"calm": value}}
        assert made[row].tolist() == list(generate_tokens(core, prompt, guidance=scale, **options))
    torch.manual_seed(0)
    several = generate(
        model, ids, mask, sliders={"calm": [0.9, 0.2]}, guidance_scale=scale, do_sample=True, num_return_sequences=2,
        temperature=1e-6,
    )  # fmt: skip
    assert torch.equal(several, made.repeat_interleave(2, 0))
    with pytest.raises(UserError, match="does not follow beams"):
        generate(model, ids, mask, sliders={"calm": 0.9}, guidance_scale=scale, num_beams=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sliders": {"loud": 0.5}}, "no slider 'loud'; it has calm, long"),
        ({"sliders": {"calm": -1}}, "slider calm is -1; it must lie from 0 to 1"),
        ({"sliders": torch.zeros(2, 3)}, "3 sliders were given, and this model has 2: calm, long"),
        ({"sliders": torch.zeros(3, 2)}, "given for 3 rows, and the batch has 2"),
        ({"tasks": "sing"}, "no task 'sing'; it has tell, ask"),
        ({"instruction_ids": torch.zeros(2, 0, dtype=torch.long)}, "the instruction is empty"),
    ],
    ids=str,
)
def test_wrong_inputs_are_one_line_each(core: ModulatedTransformer, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        ncn.hf.NCNForCausalLM.of(core)(text(), **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_trainer_hands_a_column_of_sliders_on_and_the_model_obeys(tmp_path: Path) -> None:
    """In each row of the data every token is 5 or every token is 7, as its slider says."""
    small = NCNConfig.parse(
        {"vocab_size": 23, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 16}
        | {"controller": SMALL_CONTROLLER | {"sliders": ["high"]}}
    )
    torch.manual_seed(0)
    model = ncn.hf.NCNForCausalLM.of(ModulatedTransformer(small))
    rows = []
    for number in range(64):
        value = [0.0, 1.0, NAN][number % 3]
        token = 5 if value == 0 else 7 if value == 1 else 9
        ids = torch.full((8,), token)
        ids[0] = 1
        labels = torch.where(torch.arange(8) == 1, token, -100)  # the later ones are easy to guess
        rows.append({"input_ids": ids, "labels": labels, "sliders": torch.tensor([value])})
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=120, save_steps=120,
        per_device_train_batch_size=8, learning_rate=2e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    saved = store.load_model(tmp_path / "checkpoint-120")
    first = torch.tensor([[1]])
    for value, token in [(0.0, 5), (1.0, 7), (None, 9)]:
        made = model.generate(first, sliders={"high": value}, max_new_tokens=1, do_sample=False)
        assert made[0].tolist() == [1, token]
        control = None if value is None else ControlInputs(torch.tensor([[[value]]]))
        chances = F.softmax(saved(first, control=control).logits[0, -1], -1)
        assert chances.argmax() == token
        assert chances[token] > 0.9
