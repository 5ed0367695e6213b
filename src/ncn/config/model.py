"""Settings of the model and its controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ncn.config.presets import read_preset
from ncn.config.settings import Settings
from ncn.config.signals import SIGNALS

if TYPE_CHECKING:
    SignalName = str
else:
    SignalName = Literal[tuple(SIGNALS)]


class ControllerConfig(Settings):
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


class NCNConfig(Settings):
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
        by_groups = self.controller and any(SIGNALS[name].per == "group" for name in self.controller.signals)
        if self.controller and by_groups and self.d_model % self.controller.film_groups:
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
        return cls.parse(read_preset(name)["model"]).override(**overrides)


MODEL_TYPE = "ncn"
"""What `config.json` calls this architecture."""
CONTROLLER = "controller.json"
"""Says that a folder holds a controller, whose base is elsewhere."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a saved model."""


def standard_fields(config: NCNConfig) -> dict[str, Any]:
    """The configuration under the names that Hugging Face tools look for."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
    }


def saved_config(config: NCNConfig, dtype: str) -> dict[str, Any]:
    """What a saved model's `config.json` says: a Hugging Face configuration whose entry "ncn" is the whole `config`."""
    return {
        "architectures": ["NCNForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.separator_id),
        **standard_fields(config),
        "ncn": config.model_dump(mode="json"),
    }
