"""Saved models come back as they were, and a folder that is not one says so in a line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.models import saved as store

TEXTS = ["the dog chased the cat over the hill and far away", "a tiny dragon loved to sing"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=270)


def tiny(vocab_size: int = 270, **overrides: object) -> ModulatedTransformer:
    sizes = {"vocab_size": vocab_size, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 16}
    model = ModulatedTransformer(NCNConfig.parse(sizes | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    store.save_model(tiny(), tmp_path / "saved", tokenizer)
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"controller": None, "tie_embeddings": False},
        {"positions": "learned", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 1},
        {"controller": {"taps": [0, 1], "pooling": "first", "precision_per": "layer", "gain_per": "sublayer"}},
        {"controller": {"kind": "local"}},
        {"controller": {"kind": "static", "maps": "published"}, "cross_documents": False},
    ],
)
def test_a_saved_model_computes_the_same(tmp_path: Path, tokenizer: Tokenizer, overrides: dict[str, object]) -> None:
    model = tiny(**overrides)
    store.save_model(model, tmp_path, tokenizer)

    loaded, its_tokenizer = store.load(tmp_path)

    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    ids = torch.tensor([[tokenizer.separator_id, *its_tokenizer.encode("the cat")]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bfloat16_files_are_half_as_large_and_load_as_float32(tmp_path: Path) -> None:
    model = tiny()
    store.save_model(model, tmp_path, None, dtype=torch.bfloat16)

    in_file = load_file(tmp_path / "model.safetensors")
    loaded = store.load_model(tmp_path)

    assert {tensor.dtype for tensor in in_file.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16().float())
    assert store.load_model(tmp_path, dtype=None).embedding.weight.dtype == torch.bfloat16


def test_the_folder_holds_the_three_files_and_no_leftovers(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_saving_over_an_open_model_leaves_the_open_one_alone(saved: Path, tokenizer: Tokenizer) -> None:
    loaded = store.load_model(saved)
    before = loaded.embedding.weight.clone()

    store.save_model(tiny(), saved, tokenizer)

    assert torch.equal(loaded.embedding.weight, before)


def test_a_failed_save_leaves_the_old_model(saved: Path, tokenizer: Tokenizer) -> None:
    before = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors.part").mkdir()  # nothing can be written there

    with pytest.raises(OSError, match=r"model.safetensors"):
        store.save_model(tiny(), saved, tokenizer)

    assert (saved / "model.safetensors").read_bytes() == before


def test_a_run_folder_gives_its_model(tmp_path: Path, saved: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"train": {}}')
    checkpoints = [run / "checkpoints" / name for name in ("step-2", "step-10")]
    for age, checkpoint in enumerate(checkpoints):
        shutil.copytree(saved, checkpoint)
        os.utime(checkpoint / "config.json", (age, age))
    assert store.find(run) == checkpoints[1]

    shutil.copytree(saved, run / "model")
    assert store.find(run) == run / "model"


def test_weights_in_several_files_are_read(saved: Path) -> None:
    expected = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(expected)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, members in parts.items():
        save_file({name: expected[name] for name in members}, saved / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    loaded = store.load_model(saved).state_dict()

    assert all(torch.equal(loaded[name], expected[name]) for name in names)


def test_a_name_that_is_nothing_lists_the_bundled_models() -> None:
    with pytest.raises(UserError, match=r"no folder 'stories-mnii', and no bundled model of that name \(bundled: "):
        store.load("stories-mnii")


def test_a_hub_name_without_a_network_says_so() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError, match="no folder 'nobody/nothing', and it cannot be had from the Hugging Face hub"):
        store.load("nobody/nothing")


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(UserError, match="is a file: give the folder"):
        store.load(saved / "config.json")


def test_a_run_without_a_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has saved no model yet"):
        store.load(tmp_path)


def test_a_missing_config_is_named(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config.json"):
        store.load(saved)


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', "\xff"])
def test_a_config_that_is_no_configuration_is_refused(saved: Path, content: str) -> None:
    (saved / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.json"):
        store.load(saved)


def test_a_foreign_model_is_refused_by_its_type(saved: Path) -> None:
    edit_config(saved, model_type="gpt2")
    with pytest.raises(UserError, match="a model of type 'gpt2', but only 'ncn' models"):
        store.load(saved)


def test_an_invalid_setting_is_named_with_its_file(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())["ncn"]
    edit_config(saved, ncn=content | {"num_layer": 3})
    with pytest.raises(UserError, match=r"config.json: unknown setting 'num_layer'; did you mean 'num_layers'"):
        store.load(saved)
    edit_config(saved, ncn=None)
    with pytest.raises(UserError, match='lacks the entry "ncn"'):
        store.load(saved)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or not a safetensors file"):
        store.load(saved)


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("norm.weight")

    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lack the tensor 'norm.weight'"):
        store.load(saved)

    save_file(tensors | {"norm.weight": norm[:-1].clone()}, path)
    with pytest.raises(UserError, match=r"'norm.weight' in .* has shape \[15\], but config.json asks for \[16\]"):
        store.load(saved)

    save_file(tensors | {"norm.weight": norm, "extra": norm.clone()}, path)
    with pytest.raises(UserError, match="hold the tensor 'extra', for which"):
        store.load(saved)


def test_pickled_weights_are_never_opened(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights can run code and are never opened"):
        store.load(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        store.load(saved)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the tokenizer has 270 entries, but the model's vocabulary only 260"):
        store.save_model(tiny(vocab_size=260), tmp_path, tokenizer)
    assert not list(tmp_path.iterdir())

    store.save_model(tiny(vocab_size=260), tmp_path, None)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="they do not belong together"):
        store.load(tmp_path)


def test_a_folder_without_a_tokenizer_gives_the_model_alone(tmp_path: Path) -> None:
    store.save_model(tiny(), tmp_path, None)
    assert store.load_model(tmp_path).config.num_layers == 2
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        store.load(tmp_path)


def test_a_saved_model_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    store.save_model(
        ModulatedTransformer(NCNConfig.preset("mini", vocab_size=300, num_layers=1)), tmp_path / "saved", None
    )
    (tmp_path / "other").write_text("x")
    modes = {path.stat().st_mode for path in [*(tmp_path / "saved").iterdir(), tmp_path / "other"]}
    assert len(modes) == 1
