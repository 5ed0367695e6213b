"""Where and by what something was computed: versions, processor, commit and command."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device, **facts: Any) -> dict[str, Any]:
    """Versions, processor and commit, for env.json, with further `facts`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "command": command_words(),
        **facts,
    }


def command_words() -> list[str]:
    """The command that runs, the program by its name alone; `python -m ncn` is `ncn`."""
    program = Path(sys.argv[0])
    return [program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "cpu")
    except OSError:
        return platform.processor() or "cpu"


def _git(*arguments: str) -> str | None:
    """Git's answer about the checkout that this package is run from; None where it is no checkout."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
