"""What can be trained on a base that stays as it is: a controller, or an adapter of PEFT; and, as a ceiling, the base
itself.

LoRA is Hu et al. (2021), IA3 Liu et al. (2022), prefix tuning Li and Liang (2021). The only module that imports PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ncn.config.model import ControllerConfig
from ncn.core.parameters import controller_parameters
from ncn.errors import UserError
from ncn.retrofit.attach import attach
from ncn.retrofit.families import core_config

Method = Literal["ncn", "lora", "ia3", "prefix", "full"]
METHODS: tuple[Method, ...] = get_args(Method)
LABELS: dict[Method, str] = {
    "ncn": "NCN",
    "lora": "LoRA",
    "ia3": "IA3",
    "prefix": "prefix tuning",
    "full": "full fine-tuning",
}
SIZED: dict[Method, str] = {"ncn": "hidden width", "lora": "rank", "prefix": "virtual tokens"}
"""The dial of each method whose size can be chosen."""


@dataclass(eq=False)
class Adapted:
    """A base with something on it that is to be trained, all else frozen.

    `model` is called as any transformers model, `parameters` are those to train, and `write` puts them into a folder.
    """

    method: Method
    model: Any
    parameters: list[nn.Parameter]
    write: Callable[[Path], object]

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def logits(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens, vocabulary), of windows with nothing before them."""
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found

    def save(self, folder: Path) -> int:
        """Write to `folder`; returns how many bytes of weights and configuration there are."""
        self.write(folder)
        return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))


def adapt(base: PreTrainedModel, method: Method, size: int | None, controller: ControllerConfig) -> Adapted:
    """Put a new adapter on `base`, which is not to be used by itself any more.

    Args:
        size: the method's dial (see SIZED); ignored by IA3 and by full fine-tuning.
        controller: what the controller is, apart from its hidden width.

    Raises:
        UserError: PEFT is needed and not installed, or does not know the base's architecture.
    """
    if method == "ncn":
        handle = attach(base, controller.model_copy(update={"hidden": size}))
        return Adapted(method, base, list(handle.parameters()), handle.save)
    if method == "full":
        base.requires_grad_(True)
        return Adapted(method, base, list(base.parameters()), base.save_pretrained)
    model = _with_peft(base, method, size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Adapted(method, model, trained, lambda folder: model.save_pretrained(folder, save_embedding_layers=False))


def matched_sizes(config: Any, controller: ControllerConfig, rank: int | None = None) -> dict[Method, int]:
    """Sizes at which the methods have as many parameters as whole numbers allow.

    The dial with the coarsest steps decides: LoRA's rank is `rank`, or comes nearest to the controller as it is
    given. Prefix and controller then follow LoRA.

    Args:
        config: the configuration of the base, a transformers one.
    """
    if rank is None:
        rank = _nearest(config, "lora", _count(config, "ncn", controller.hidden, controller), controller)
    target = _count(config, "lora", rank, controller)
    return {
        "ncn": _nearest(config, "ncn", target, controller),
        "lora": rank,
        "prefix": _nearest(config, "prefix", target, controller),
    }


def check_peft() -> Any:
    """PEFT; raises `UserError` where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("PEFT is not installed: pip install peft") from None
    return peft


def _with_peft(base: PreTrainedModel, method: Method, size: int | None) -> Any:
    peft = check_peft()
    if method == "lora":  # the scale, twice the rank, is a factor on a learning rate that is swept anyway
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=size, lora_alpha=2 * (size or 1), lora_dropout=0.0)
    elif method == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size)
    else:
        config = peft.IA3Config(task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():  # of its own calls, and of settings that it corrects
            warnings.simplefilter("ignore")
            return peft.get_peft_model(base, config)
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"PEFT has no {LABELS[method]} for a {base.config.model_type!r} model ({reason}); leave it out of --methods"
        ) from None


def _nearest(config: Any, method: Method, target: int, controller: ControllerConfig) -> int:
    """The size at which the method comes nearest to `target` parameters: their number is linear in every dial."""
    one, two = (_count(config, method, size, controller) for size in (1, 2))
    return max(1, 1 + round((target - one) / (two - one)))


def _count(config: Any, method: Method, size: int, controller: ControllerConfig) -> int:
    """Parameters that would be trained; nothing is allocated."""
    if method == "ncn":
        text = config.get_text_config()
        wanted = controller.model_copy(update={"hidden": size})
        return controller_parameters(core_config(text, wanted, text.num_hidden_layers))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model = _with_peft(base, method, size)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
