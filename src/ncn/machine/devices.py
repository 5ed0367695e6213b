"""Where to compute, in which number format, on how many cores; and the time there."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from ncn.errors import UserError


def _made_by_amd() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        described = platform.processor()
    return "AuthenticAMD" in described


MADE_BY_AMD = _made_by_amd()
"""Whether the processor is one of AMD's. Where two ways of calculating differ in speed, this decides and not a
stopwatch, so that the same machine always gives the same numbers."""


def arithmetic(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products are computed in under autocast, None for float32."""
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    matrices = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    # Of Intel's, a processor that has these instructions and no AMX takes a third longer in bfloat16 than in float32.
    vectors = MADE_BY_AMD and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if matrices or vectors else None


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises `UserError` where there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} here; use device=cpu or device=auto") from None
    return device


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronised_time(device: torch.device) -> float:
    """Seconds of a clock, read when everything that the device was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
