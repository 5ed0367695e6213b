"""The command's frame: how it ends when something is wrong or stopped, and the options and words that verbs share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, cast, get_args, get_origin

import typer

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.presets import presets
from ncn.config.training import TrainConfig
from ncn.errors import UserError
from ncn.machine.memory import keep_freed_memory
from ncn.machine.stopping import Interrupted

if TYPE_CHECKING:
    from ncn.data.dataset import TokenDataset
    from ncn.data.tokenizer import Tokenizer
    from ncn.lab.fleet import Launcher

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Language models that tune themselves, token by token: train them, use them, and see their control signals.",
)

DEFAULT_MODEL = "stories-mini"
DEFAULT_DATA, DEFAULT_VALID = "tinystories-sample", "tinystories-sample-valid"
_WRONG, _INTERRUPTED = 1, 130
"""Exit statuses: the user can mend it; stopped, with everything saved."""

ModelArgument = Annotated[str, typer.Argument(help="Run folder, saved folder, bundled model or hub name.")]
PresetOption = Annotated[str | None, typer.Option(help=f"One of {', '.join(presets())}. [default: mini]")]
RecipeFileOption = Annotated[Path | None, typer.Option(help="Or a recipe file, YAML or JSON.")]
DataOption = Annotated[str, typer.Option(help="Dataset folder, or any source that `ncn prepare` reads.")]
ValidOption = Annotated[str, typer.Option(help="The same, to measure on.")]
JobsOption = Annotated[int | None, typer.Option(help="Runs at once; default: one a core, or one a device.")]
LauncherOption = Annotated[str, typer.Option(help="local, or ray: the runs go to a Ray cluster.")]
SharedSettings = Annotated[list[str] | None, typer.Argument(help="Settings to change in all arms, as for `ncn train`.")]


def main() -> None:
    """Run the command; a mistake of the user's becomes one line on standard error and exit status 1."""
    # Threads that spin while they wait slow everything down many times over as soon as something else uses the cores;
    # threads that sleep at once take longer to wake than a small product takes. So they spin, but not for long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
    try:
        app()
    except UserError as error:
        _end(f"error: {error}", _WRONG)
    except OSError as error:  # a folder that cannot be written to, a full disk, ...
        _end(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", _WRONG)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


@contextmanager
def stoppable(how: str = "give the same command again") -> Iterator[None]:
    """Context for work that saves itself when it is stopped: the command then says `how` to go on, and ends."""
    try:
        yield
    except Interrupted as stop:
        _end(f"{stop}; to go on, {how}", _INTERRUPTED)


def describe_settings() -> str:
    """Every field of a recipe with its default, meaning and, where they are few, values, for `ncn train --help`."""
    sections = (("model", NCNConfig), ("model.controller", ControllerConfig), ("train", TrainConfig))
    lines = ["Settings (key=value; the section may be left out where the name is unique):", ""]
    for title, section in sections:
        for name, field in section.model_fields.items():
            if field.description:
                default = "" if field.is_required() or field.default_factory else f" [{field.default}]"
                values = _known_values(field.annotation)
                prefix = title.removeprefix("model.") + "." if title != "train" else "train."
                lines += [f"{prefix}{name}{default}: {field.description}{values}", ""]
    return "\n".join(lines)


def _known_values(annotation: object) -> str:
    """The words that a setting, or each entry of a list, may be; empty where it may be anything else too."""
    several = get_origin(annotation) is tuple
    inner = get_args(annotation)[0] if several else annotation
    known = get_args(inner) if get_origin(inner) is Literal else ()
    return f" ({'any' if several else 'one'} of: {', '.join(known)})" if known else ""


def model_and_text(words: list[str], what: str) -> tuple[str, str]:
    if not 1 <= len(words) <= 2:
        raise UserError(f"give [MODEL] {what}: at most a model and one text; put quotes around the text")
    return (words[0], words[1]) if len(words) == 2 else (DEFAULT_MODEL, words[0])


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} does not fit") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def open_dataset(data: str, tokenizer: Tokenizer, into: Path) -> TokenDataset:
    """A prepared folder as it is; anything else is prepared in the folder `into`, with the model's tokenizer."""
    import tempfile

    from ncn.data.dataset import TokenDataset
    from ncn.data.prepare import prepare

    if Path(data).is_dir():
        return TokenDataset.open(data)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        prepare([data], into, tokenizer=scratch, progress=True)
    return TokenDataset.open(into)


def recipe_source(preset: str | None, config: Path | None) -> str | Path | None:
    """The preset or the recipe file that is asked for, if one is; raises `UserError` for both."""
    if preset and config:
        raise UserError("give --preset or --config, not both; a recipe file may itself hold `preset: NAME`")
    return config or preset


def check_launcher(name: str) -> Launcher:
    """Raises `UserError` for an unknown one."""
    if name not in ("local", "ray"):
        raise UserError(f"unknown launcher {name!r}; launchers: local, ray")
    return cast("Launcher", name)


def parse_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def format_size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} TiB"


def parse_count(text: str) -> int:
    """A whole number, perhaps in thousands (k), millions (M) or billions (B, G): 200k, 3.3M, 1_000_000."""
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBgG]?)", text.strip())
    if not found:
        raise UserError(f"a number of tokens is written 200000, 200k or 3.3M, got {text!r}")
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}[found[2].lower()]
    return round(float(found[1]) * scale)
