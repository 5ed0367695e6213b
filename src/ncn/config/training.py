"""Settings of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ncn.config.settings import Settings

IGNORED = -100
"""The target of a position that has none; as in torch and transformers."""


class TrainConfig(Settings):
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
