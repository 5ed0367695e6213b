"""The model as a transformers model, against the real library: its files, and what a forward pass takes and gives."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ncn.hf
from hf_models import VARIANTS, awake, text
from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
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
