"""Configuration: where values come from, what is refused, and that each refusal is one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.presets import presets
from ncn.config.recipe import Recipe
from ncn.config.training import TrainConfig
from ncn.errors import UserError

SMALL = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "context_length": 16}


def small(**fields: Any) -> NCNConfig:
    return NCNConfig.parse(SMALL | fields)


def complaint(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_round_trip(name: str) -> None:
    recipe = Recipe.preset(name)
    assert Recipe.parse(recipe.model_dump()) == recipe
    assert Recipe.parse(json.loads(recipe.model_dump_json())) == recipe
    assert NCNConfig.preset(name) == recipe.model


def test_the_smallest_preset_comes_first() -> None:
    assert presets()[0] == "mini"


def test_unknown_preset_names_the_nearest_and_all() -> None:
    text = complaint(Recipe.preset, "mimi")
    assert "'mimi'" in text
    assert "did you mean 'mini'?" in text
    assert all(name in text for name in presets())


def test_preset_with_overrides() -> None:
    config = NCNConfig.preset("mini", num_layers=3, controller={"taps": [0, 2]})
    assert config.num_layers == 3
    assert config.controller == NCNConfig.preset("mini").controller.override(taps=(0, 2))
    assert NCNConfig.preset("mini", controller=None).controller is None
    assert NCNConfig.preset("mini", controller=ControllerConfig(hidden=5)).controller.hidden == 5


def test_a_controller_can_be_put_back_by_its_fields() -> None:
    assert small(controller=None).override(controller={"hidden": 3}).controller == ControllerConfig(hidden=3)


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small().d_model = 3


@pytest.mark.parametrize(
    ("fields", "nearest"),
    [
        ({"num_layer": 3}, "num_layers"),
        ({"dmodel": 3}, "d_model"),
        ({"controller": {"pooling_head": 1}}, "pooling_heads"),
        ({"controller": {"tap": [0]}}, "taps"),
    ],
)
def test_an_unknown_key_names_the_nearest(fields: dict[str, Any], nearest: str) -> None:
    text = complaint(small, **fields)
    assert text.startswith("unknown setting")
    assert text.endswith(f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 3}, ["d_model (32)", "num_heads (3)"]),
        ({"num_kv_heads": 3}, ["num_heads (4)", "num_kv_heads (3)"]),
        ({"d_model": 12}, ["even head width", "got 3", "positions=learned"]),
        ({"separator_id": 64}, ["separator_id (64)", "vocabulary (64)"]),
        ({"controller": {"taps": [0, 2]}}, ["[0, 2]", "2-layer"]),
        ({"controller": {"taps": [1]}}, ["start at 0", "[1]"]),
        ({"controller": {"taps": [0, 0]}}, ["increase", "[0, 0]"]),
        ({"controller": {"taps": []}}, ["start at 0", "[]"]),
        ({"controller": {"taps": [0, 1], "pooling": "first", "phasic": False}}, ["would read nothing", "taps=[0]"]),
        ({"controller": {"width": 10, "pooling_heads": 4}}, ["width (10)", "pooling_heads (4)"]),
        ({"controller": {"signals": []}}, ["at least one"]),
        ({"controller": {"signals": ["gain", "gain"]}}, ["once"]),
        ({"controller": {"signals": ["gian"]}}, ["controller.signals.0", "'gian'", "'gain'"]),
        ({"controller": {"kind": "none"}}, ["controller.kind", "'none'", "'static'"]),
        ({"num_layers": 0}, ["num_layers", "greater than or equal to 1", "0"]),
        ({"vocab_size": "many"}, ["vocab_size", "integer", "'many'"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(fields: dict[str, Any], words: list[str]) -> None:
    text = complaint(small, **fields)
    assert all(word in text for word in words), text


def test_missing_field() -> None:
    assert "d_model" in complaint(NCNConfig.parse, {"vocab_size": 5})


def test_derived_sizes() -> None:
    config = small(num_kv_heads=2)
    assert (config.head_dim, config.kv_heads, config.ffn_width) == (8, 2, 128)
    assert small().kv_heads == 4
    assert small(d_ff=7).ffn_width == 7
    swiglu = small(d_model=192, activation="swiglu").ffn_width
    assert swiglu == 512
    assert small(activation="swiglu").ffn_width % 32 == 0


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files(tmp_path: Path, suffix: str) -> None:
    recipe = Recipe(model=small(controller={"taps": (0, 1)}), train=TrainConfig(seed=4))
    path = tmp_path / f"recipe{suffix}"
    values = json.loads(recipe.model_dump_json())
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values), "utf-8")
    assert Recipe.read(path) == recipe
    assert Recipe.read(str(path), ["seed=9"]).train.seed == 9


def test_a_file_may_hold_what_differs_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: mini\nmodel:\n  num_layers: 2\n", "utf-8")
    recipe = Recipe.read(path)
    assert recipe.model == NCNConfig.preset("mini", num_layers=2)
    assert recipe.train == Recipe.preset("mini").train


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("num_layers=3", ("model", "num_layers", 3)),
        ("model.num_layers=3", ("model", "num_layers", 3)),
        ("seed=5", ("train", "seed", 5)),
        ("train.seed=5", ("train", "seed", 5)),
        ("learning_rate=3e-3", ("train", "learning_rate", 3e-3)),
        ("trackers=[tensorboard]", ("train", "trackers", ("tensorboard",))),
        ("controller=null", ("model", "controller", None)),
        ("cross_documents=false", ("model", "cross_documents", False)),
        ("device=cuda:1", ("train", "device", "cuda:1")),
    ],
)
def test_dotted_overrides(override: str, expected: tuple[str, str, Any]) -> None:
    section, field, value = expected
    recipe = Recipe.read("mini", [override])
    assert getattr(getattr(recipe, section), field) == value
    assert recipe == Recipe.preset("mini").override(**{section: {field: value}})


def test_overrides_of_the_controller_keep_its_other_fields() -> None:
    controller = Recipe.read("mini", ["controller.taps=[0,2]", "controller.hidden=7"]).model.controller
    assert (controller.taps, controller.hidden) == ((0, 2), 7)
    assert controller.width == Recipe.preset("mini").model.controller.width


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_layer=3", ["'num_layer'", "did you mean 'num_layers'?"]),
        ("controller.tap=[0]", ["controller.tap", "did you mean 'taps'?"]),
        ("train.sed=1", ["train.sed", "did you mean 'seed'?"]),
        ("num_layers", ["key=value", "'num_layers'"]),
        ("=3", ["key=value"]),
        ("taps=[0", ["taps"]),
        ("num_layers=[0", ["not valid YAML", "num_layers"]),
        ("num_layers=two", ["num_layers", "'two'"]),
        ("train=3", ["train"]),
        ("betas=[0.9]", ["betas"]),
    ],
)
def test_bad_overrides(override: str, words: list[str]) -> None:
    text = complaint(Recipe.read, "mini", [override])
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "model: [", ["a.yaml", "not valid yaml"]),
        ("a.json", "{", ["a.json", "not valid json"]),
        ("a.yaml", "just words", ["a.yaml", "mapping"]),
        ("a.yaml", "", ["a.yaml", "mapping"]),
        ("a.yaml", "train: {}", ["model", "required"]),
        ("a.yaml", "preset: mimi", ["did you mean 'mini'?"]),
        ("a.yaml", "!!python/object/apply:os.getcwd []", ["a.yaml", "not valid yaml"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    text = complaint(Recipe.read, tmp_path / name)
    assert all(word in text for word in words), text


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "no configuration file" in complaint(Recipe.read, tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    assert "cannot read" in complaint(Recipe.read, tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot read" in complaint(Recipe.read, tmp_path / "folder.yaml")


def test_a_tap_at_every_layer_follows_the_number_of_layers() -> None:
    config = small(controller={"taps": "every"})
    assert config.controller is not None
    for layers in (1, 2, 5):
        assert config.controller.taps_in(layers) == tuple(range(layers))
    assert config.override(num_layers=5).controller == config.controller
    assert "every" in complaint(small, controller={"taps": "all"})
