"""Losses, gradients, the Trainer and a compiled forward pass of the model as a transformers model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ncn.hf
from hf_models import VARIANTS, awake, padded_left, text
from ncn.core.model import ModulatedTransformer
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
