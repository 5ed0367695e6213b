"""`torch.compile`, with one clear line where it cannot work."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ncn.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`torch.compile(function, **options)`; raises `UserError` where there is no C++ compiler for it to use."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(shlex.split(name)[0]) is None:
        raise UserError(f"compiling needs a C++ compiler, and {name} was not found; install one, or do not compile")
    result: Callable[P, R] = torch.compile(function, **options)
    return result
