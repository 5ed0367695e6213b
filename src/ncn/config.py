"""Configuration of the model, its controller and its training: typed, frozen, validated, and free of torch.

A configuration comes from a preset (`recipes/*.yaml`), a YAML or JSON file, keyword arguments, or dotted overrides
such as ``controller.taps=[0,2]``. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ncn.errors import UserError

SignalName = Literal["gain", "precision", "ffn_gate", "head_gate", "norm_film"]
Config = TypeVar("Config", bound="_Config")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Validate `values`; raises `UserError`, one line that names the field and, for a misspelt one, the nearest."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_one_line(error, cls)) from None

    def override(self: Config, **changes: Any) -> Config:
        """A copy with fields replaced; nested fields may be given as mappings, and everything is validated again."""
        return self.parse(_merge(self.model_dump(), changes))


class ControllerConfig(_Config):
    """Where the control signals come from, and which there are."""

    kind: Literal["ncn", "static", "local"] = Field(
        "ncn",
        description="ncn: one network reads the context (equations 1 to 3); static: one learned constant per signal "
        "and layer; local: each layer's own linear read-out of its input. The last two are the control arms of an A/B.",
    )
    signals: tuple[SignalName, ...] = Field(
        ("gain", "precision", "ffn_gate", "head_gate"), description="control signals to send, in this order"
    )
    maps: Literal["smooth", "published"] = Field(
        "smooth", description="range maps: smooth and exactly neutral at 0, or as published (equation 4)"
    )
    precision_per: Literal["layer", "head"] = Field("head", description="one attention precision per layer or per head")
    gain_per: Literal["layer", "sublayer"] = Field(
        "layer", description="one gain for both sublayers of a layer, as published, or one for each"
    )
    film_groups: int = Field(
        8, ge=1, description="groups of channels that norm_film scales, in each of a layer's two norms"
    )
    taps: tuple[int, ...] | Literal["every"] = Field(
        (0,),
        description="layers whose input a controller reads, or every; tap m serves layer m and those above, up to the "
        "next tap",
    )
    width: int = Field(32, ge=1, description="width of the controller's input u (equation 2)")
    hidden: int = Field(32, ge=1, description="width of the controller's hidden layer")
    pooling_heads: int = Field(
        4, ge=1, description="heads of the causal salience pooling, each with its own time scale"
    )
    pooling: Literal["every", "first"] = Field(
        "every",
        description="taps that pool the text so far (equation 1): every one, or the first, whose context the others "
        "share, each adding its own local state to it",
    )
    phasic_kernel: int = Field(4, ge=1, description="tokens seen by the phasic short convolution")
    phasic: bool = Field(
        True, description="whether the controller sees the local state at all, beside the pooled context"
    )
    sliders: tuple[str, ...] = Field(
        (), description="inputs from outside, each from 0 to 1 or unset, such as the attributes of `ncn prepare`"
    )
    sliders_enter: Literal["controller", "layers", "prefix", "embedding"] = Field(
        "controller",
        description="where sliders enter: the controller; the input of every sublayer, through adapters (layers); or, "
        "to compare with, the embedding of the token that begins a document (a prefix token), or the embeddings of all "
        "tokens",
    )
    slider_rank: int = Field(
        32,
        ge=0,
        description="units of each adapter through which sliders enter the layers, beside a direction for each slider",
    )
    tasks: tuple[str, ...] = Field((), description="names of tasks, each an embedding of its own in the controller")
    instructions: bool = Field(False, description="whether the controller reads an instruction in words")

    @model_validator(mode="after")
    def _consistent(self) -> ControllerConfig:
        if not self.signals or len(set(self.signals)) != len(self.signals):
            raise ValueError("controller.signals must name each signal once, and at least one")
        for field in ("sliders", "tasks"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"controller.{field} must name each of them once")
        if self.kind != "ncn" and (self.sliders_read or self.tasks or self.instructions):
            raise ValueError(
                f"inputs from outside need controller.kind=ncn; {self.kind} signals have none, but sliders may enter "
                "beside them, with controller.sliders_enter=layers, prefix or embedding"
            )
        if self.width % self.pooling_heads:
            raise ValueError(
                f"controller.width ({self.width}) must be a multiple of pooling_heads ({self.pooling_heads})"
            )
        if self.pooling == "first" and not self.phasic and self.taps != (0,):
            raise ValueError(
                "with controller.pooling=first and phasic=false a tap but the first would read nothing; "
                "change one of them, or set controller.taps=[0]"
            )
        if self.taps == "every":
            return self
        if not self.taps or self.taps[0] != 0 or list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"controller.taps must start at 0 and increase, got {list(self.taps)}")
        return self

    @field_validator("taps", mode="before")
    @classmethod
    def _taps_have_a_form(cls, taps: object) -> object:
        if isinstance(taps, (str, int)) and taps != "every":
            raise ValueError(f"controller.taps is {taps!r}; it must be a list of layers, such as [0,2], or every")
        return taps

    @property
    def sliders_read(self) -> tuple[str, ...]:
        """The sliders that enter the controller itself."""
        return self.sliders if self.sliders_enter == "controller" else ()

    def taps_in(self, num_layers: int) -> tuple[int, ...]:
        """The tapped layers of a model with `num_layers` layers."""
        return tuple(range(num_layers)) if self.taps == "every" else self.taps


class NCNConfig(_Config):
    """The whole model. `controller=None` is the static baseline: the same code, unmodulated."""

    vocab_size: int = Field(ge=2, description="entries of the tokenizer")
    d_model: int = Field(ge=1, description="width of the residual stream")
    num_layers: int = Field(ge=1, description="transformer layers")
    num_heads: int = Field(ge=1, description="attention heads")
    num_kv_heads: int | None = Field(
        None, ge=1, description="key/value heads (grouped-query attention); default: num_heads"
    )
    d_ff: int | None = Field(None, ge=1, description="feed-forward width; default 4·d_model, or 8/3 of it for swiglu")
    context_length: int = Field(ge=1, description="longest sequence, in tokens")
    positions: Literal["rope", "learned"] = Field("rope", description="rotary or learned absolute positions")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="feed-forward activation")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys per head")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every RMSNorm")
    tie_embeddings: bool = Field(True, description="the output head shares the embedding matrix")
    cross_documents: bool = Field(
        False, description="whether attention and salience may look across a document border inside a window"
    )
    separator_id: int = Field(0, ge=0, description="token that begins a document")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    controller: ControllerConfig | None = Field(default_factory=ControllerConfig, description="None: static baseline")

    @model_validator(mode="after")
    def _consistent(self) -> NCNConfig:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads})")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.head_dim}; use positions=learned")
        if self.separator_id >= self.vocab_size:
            raise ValueError(f"separator_id ({self.separator_id}) lies outside the vocabulary ({self.vocab_size})")
        if self.controller and max(taps := self.controller.taps_in(self.num_layers)) >= self.num_layers:
            raise ValueError(f"controller.taps {list(taps)} name a layer that a {self.num_layers}-layer model lacks")
        if self.controller and "norm_film" in self.controller.signals and self.d_model % self.controller.film_groups:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of controller.film_groups ({self.controller.film_groups})"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        if self.activation == "gelu":
            return 4 * self.d_model
        return -(-8 * self.d_model // 3 // 32) * 32  # 8/3 keeps the parameters of 4·d_model; whole multiples of 32

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NCNConfig:
        """The model configuration of a preset, with any field replaced: ``NCNConfig.preset("mini", num_layers=4)``."""
        return Recipe.preset(name).model.override(**overrides)


class TrainConfig(_Config):
    """How a model is trained. Everything that changes the result is here, and nothing else is."""

    tokens: int = Field(10_000_000, ge=1, description="training budget in tokens (targets), rounded up to whole steps")
    batch_size: int = Field(16, ge=1, description="sequences per optimiser step, over all processes")
    context: int | None = Field(None, ge=1, description="window length in tokens; default: the model's context_length")
    accumulation: int = Field(1, ge=1, description="micro-batches that a step's batch is cut into")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw, or muon for the hidden matrices with adamw for the rest"
    )
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    muon_learning_rate: float = Field(0.02, gt=0, description="peak learning rate of the matrices under muon")
    controller_learning_rate: float = Field(
        1.0, gt=0, description="multiplier on the learning rate of the controller's parameters"
    )
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay after warm-up")
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the steps over which the learning rate rises")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of the matrices; vectors and embeddings have none"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment coefficients")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    homeostatic_weight: float = Field(0.0, ge=0, description="λ of equation (6)")
    homeostatic_schedule: Literal["constant", "annealed"] = Field(
        "constant", description="λ stays, or falls linearly to zero over the run"
    )
    input_dropout: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of windows trained without inputs from outside: a low one makes them obeyed, a high one "
        "keeps the loss low without them",
    )
    single_input_dropout: float = Field(
        0.03, ge=0, le=1, description="share of inputs left out of the other windows, one by one"
    )
    balance_sliders: bool = Field(
        False,
        description="weigh documents such that sliders are uncorrelated with each other and with all other attributes "
        "of the data, in windows that are given them: what a slider is not named after, it then moves less",
    )
    only_inputs: bool = Field(
        False,
        description="train only what sliders, tasks and instructions enter by, on a trained model (--start), which "
        "stays exactly what it was where they are unset",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the matrix products; auto: bfloat16 where the processor is fast at it"
    )
    compile: bool = Field(False, description="compile the model with torch.compile")
    seed: int = Field(1, ge=0, description="seed of the initial weights and of the order of the batches")
    init_seed: int | None = Field(None, ge=0, description="seed of the initial weights alone; default: seed")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits exist at once in the loss")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(500, ge=1, description="steps between validations")
    eval_tokens: int = Field(
        100_000, ge=1, description="validation tokens used during training; the end uses the whole file"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="where else to log, beside metrics.jsonl"
    )


class Recipe(_Config):
    """A model together with the way it is trained: what a recipe file holds."""

    model: NCNConfig
    train: TrainConfig = TrainConfig()
    base: str | None = Field(
        None, description="folder or hub name of a transformers model; only a controller on it is then trained"
    )

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """Read a preset that ships with the package; raises `UserError` naming the known ones."""
        if name not in presets():
            raise UserError(f"unknown preset {name!r}{_nearest(name, presets())}; presets: {', '.join(presets())}")
        return cls.parse(yaml.safe_load((resources.files("ncn") / "recipes" / f"{name}.yaml").read_text("utf-8")))

    @classmethod
    def read(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A preset's name or a YAML/JSON file, then dotted overrides: ``controller.taps=[0,2]``, ``train.seed=3``.

        An override's first word may be ``model`` or ``train``; without it the field is looked up in both.
        A file may hold ``preset: NAME`` and only what differs from it.
        """
        path = Path(source)
        if path.suffix in {".yaml", ".yml", ".json"}:
            values = _read_mapping(path)
            if "preset" in values:
                values = _merge(cls.preset(values.pop("preset")).model_dump(), values)
        else:
            values = cls.preset(str(source)).model_dump()
        return cls.parse(_merge_settings(values, overrides))

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """A copy with dotted overrides, as in `read`."""
        return self.parse(_merge_settings(self.model_dump(), settings))


def presets() -> list[str]:
    """Names of the presets that ship with the package, smallest model first."""
    order = ["mini", "published-18m", "100m", "350m", "1b"]
    found = {entry.name.removesuffix(".yaml") for entry in (resources.files("ncn") / "recipes").iterdir()}
    return [name for name in order if name in found] + sorted(found - set(order))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping with the keys 'model' and 'train'")
    return values


def _merge_settings(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    for text in settings:
        values = _merge(values, _override_mapping(text))
    return values


def _override_mapping(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"an override is written key=value, got {text!r}")
    path = key.strip().split(".")
    if path[0] not in Recipe.model_fields:
        owners = [name for name, fields in _SECTIONS.items() if path[0] in fields]
        if not owners:
            known = [*Recipe.model_fields, *(field for fields in _SECTIONS.values() for field in fields)]
            raise UserError(f"unknown setting {path[0]!r}{_nearest(path[0], known)}")
        path.insert(0, owners[0])
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"the value of {key} is not valid YAML: {value!r}") from None
    if isinstance(nested, str):
        nested = _number_or_text(nested)
    for name in reversed(path):
        nested = {name: nested}
    assert isinstance(nested, dict)
    return nested


def _number_or_text(text: str) -> float | str:
    # YAML 1.1 reads 3e-3 as a string, because it wants a dot in the mantissa.
    try:
        return float(text)
    except ValueError:
        return text


_SECTIONS = {"model": set(NCNConfig.model_fields), "train": set(TrainConfig.model_fields)}


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        old = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = _merge(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {where!r}{_nearest(str(problem['loc'][-1]), _field_names(cls))}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})" if problem["type"] != "value_error" else message


def _field_names(cls: type[BaseModel]) -> set[str]:
    sections = (NCNConfig, ControllerConfig, TrainConfig) if cls is Recipe else (cls, ControllerConfig)
    return {name for section in sections for name in section.model_fields}
