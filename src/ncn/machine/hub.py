"""Repositories of the Hugging Face hub, by name: what of them is needed, from the network or the library's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ncn.errors import UserError

_FILES = (".json", ".xz", ".txt")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a repository's, "owner/name". So has many a path: look on disk first."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not name.endswith(_FILES)


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """A folder with those files of the repository `name` that match one of the patterns, as far as there are any.

    Raises `UserError` where the repository cannot be had.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"no folder {name!r}; to look for it on the Hugging Face hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and plain errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"no folder {name!r}, and it cannot be had from the Hugging Face hub ({', '.join(patterns)}): {reason}"
        ) from None
