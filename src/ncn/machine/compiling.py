"""`torch.compile`, with one clear line where it cannot work."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from ncn.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`torch.compile(function, **options)`; raises `UserError` where there is no C++ compiler for it to use, and, when
    called, where compiling fails."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if shutil.which(compiler) is None:
        raise UserError(
            f"compiling needs a C++ compiler, and {compiler!r} was not found; install one, or do not compile"
        )
    inner = torch.compile(function, **options)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return inner(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"torch could not compile the model ({reason}); do not compile") from error

    return call
