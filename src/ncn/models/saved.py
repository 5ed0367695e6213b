"""Saved models: one folder with `config.json`, `model.safetensors` and `tokenizer.json`, read here and by transformers.

The tensors carry the names of `ModulatedTransformer.state_dict()`, and `config.json` is a Hugging Face configuration
whose entry "ncn" is the whole `NCNConfig`. Only safetensors are read: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ncn.config.model import CONFIG, CONTROLLER, MODEL_TYPE, WEIGHTS, NCNConfig
from ncn.core.interface import LanguageModel
from ncn.core.model import ModulatedTransformer
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.machine.files import ASSETS, file_sha256, flat
from ncn.machine.hub import from_hub, is_hub_name

INDEX = "model.safetensors.index.json"


def save_model(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model to `folder`, with its tokenizer if there is one.

    `dtype` is the number format of the file (default: that of the parameters). Every file is written to a temporary
    name and renamed. Raises `UserError` for a tokenizer with more entries than the model.
    """
    folder = Path(folder)
    if tokenizer is not None:
        _check_vocabulary(model.core_config, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    model.write(folder, dtype)


def load(name_or_path: str | Path, *, dtype: torch.dtype | None = torch.float32) -> tuple[LanguageModel, Tokenizer]:
    """A trained model, in evaluation mode, and its tokenizer.

    `name_or_path` is the name of a bundled model, a run folder, a saved folder, or the name of a repository on the
    Hugging Face hub ("owner/name"), looked for in this order. `dtype` is the number format to compute in; None keeps
    that of the file. Raises `UserError` when there is no such model, or when its files are damaged or do not fit.
    """
    folder = find(name_or_path)
    if (folder / CONTROLLER).is_file():
        from ncn.retrofit.loading import load_retrofitted

        return load_retrofitted(folder)
    model = load_model(folder, dtype=dtype)
    tokenizer = Tokenizer.load(folder)
    _check_vocabulary(model.core_config, tokenizer)
    return model, tokenizer


def load_model(folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> ModulatedTransformer:
    """The model alone, in evaluation mode, from a folder that holds `config.json` and `model.safetensors`."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = ModulatedTransformer(config)
    tensors = _read_tensors(folder, dtype)
    _check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_start(model: LanguageModel, start: str | Path, tokenizer_sha256: str) -> None:
    """Give `model` the weights of the trained model `start`, as `load` finds it, to train on from there. Inputs from
    outside that the trained model has not got keep the weights that they have.

    Raises `UserError` where it is another model, or knows the text by other tokens than those of the tokenizer with the
    fingerprint `tokenizer_sha256`.
    """
    folder = find(start)
    if Tokenizer.load(folder).fingerprint != tokenizer_sha256:
        raise UserError(f"the data was prepared with another tokenizer than that of {start}: use --tokenizer {folder}")
    trained = load_model(folder)
    old, new = (flat(config.model_dump(mode="json")) for config in (trained.config, model.core_config))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not _adds_inputs(name, trained.config):
            raise UserError(
                f"the weights of {start} are of another model: {name} is {old.get(name)!r} there and "
                f"{new.get(name)!r} here; leave the model's settings as they are there"
            )
    model.load_state_dict({**model.state_dict(), **trained.state_dict()})


_OF_SLIDERS = ("controller.sliders", "controller.sliders_enter", "controller.slider_rank")


def _adds_inputs(setting: str, trained: NCNConfig) -> bool:
    """Whether another value of `setting` only gives the trained model inputs from outside of a kind that it lacks."""
    controller = trained.controller
    if controller is None:
        return False
    return (
        (setting in _OF_SLIDERS and not controller.sliders)
        or (setting == "controller.tasks" and not controller.tasks)
        or (setting == "controller.instructions" and not controller.instructions)
    )


def weights_fingerprint(name_or_path: str | Path) -> str:
    """SHA-256 of a saved model's weight files."""
    found = hashlib.sha256()
    for path in _weight_files(find(name_or_path)):
        file_sha256(path, found)
    return found.hexdigest()


def read_config(folder: Path) -> NCNConfig:
    """The `NCNConfig` in the folder's `config.json`."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {CONFIG}: expected a folder written by NCN's training or save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != MODEL_TYPE:
        raise UserError(f"{path} describes a model of type {kind!r}, but only {MODEL_TYPE!r} models can be loaded here")
    if not isinstance(content.get("ncn"), dict):
        raise UserError(f'{path} lacks the entry "ncn" that describes the model; save the model again')
    try:
        return NCNConfig.parse(content["ncn"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def find(name_or_path: str | Path) -> Path:
    """The folder of a bundled, local or hub model; raises `UserError` that says what was tried."""
    if isinstance(name_or_path, str) and name_or_path in bundled():
        return ASSETS / name_or_path
    path = Path(name_or_path)
    if path.is_dir():
        return _in_run_folder(path)
    if path.exists():
        raise UserError(f"{path} is a file: give the folder that holds it")
    if isinstance(name_or_path, str) and is_hub_name(name_or_path):
        return from_hub(name_or_path, ["*.json", "*.safetensors"])
    names = ", ".join(bundled()) or "none"
    raise UserError(f"no folder {str(name_or_path)!r}, and no bundled model of that name (bundled: {names})")


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(entry.name for entry in ASSETS.iterdir() if (entry / CONFIG).is_file())


def _in_run_folder(path: Path) -> Path:
    """A run folder keeps its finished model in `model/`, and before that one in each checkpoint."""
    if (path / "model").is_dir():
        return path / "model"
    saved = [entry for entry in (path / "checkpoints").glob("*") if (entry / CONFIG).is_file()]
    if saved:
        return max(saved, key=lambda entry: (entry / CONFIG).stat().st_mtime_ns)
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run in {path} has saved no model yet")
    return path


def _read_tensors(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = _copy(file.get_tensor(name), dtype)
        except FileNotFoundError:
            raise UserError(f"{folder} lacks {path.name}; copy the whole folder again") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    return tensors


def _copy(mapped: Tensor, dtype: torch.dtype | None) -> Tensor:
    # The file is mapped into memory, and memory that a later writer could change is no place for weights.
    return mapped.to(dtype or mapped.dtype, copy=True)


def _weight_files(folder: Path) -> list[Path]:
    """The weights' file, or the files that transformers cut a large model into."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        return [folder / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {folder / INDEX}: {error}") from None
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise UserError(
            f"{folder} holds {pickled[0]} but no {WEIGHTS}: pickled weights can run code and are never opened; "
            "convert them to safetensors"
        )
    raise UserError(f"{folder} holds no {WEIGHTS}")


def _check_tensors(model: ModulatedTransformer, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"the weights in {folder} lack the tensor {name!r} that {CONFIG} asks for")
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"tensor {name!r} in {folder} has shape {list(tensors[name].shape)}, "
                f"but {CONFIG} asks for {list(tensor.shape)}"
            )
    for name in tensors:
        if name not in expected:
            raise UserError(f"the weights in {folder} hold the tensor {name!r}, for which {CONFIG} has no place")


def _check_vocabulary(config: NCNConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, but the model's vocabulary only {config.vocab_size}: "
            "they do not belong together"
        )
