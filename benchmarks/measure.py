"""How things are timed here, and what the machine could do at best."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call, the device's queue included."""
    begun = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def interleaved(arms: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every arm in every round: A B C, B C A, ... so that no arm owns the quiet or the noisy moments."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            taken = seconds(arms[name])
            if index >= 0:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], arm: str, against: str) -> dict[str, float]:
    """Time of `arm` in units of the time of `against`, round by round: the median, with a 95 % interval from rounds
    drawn again; and of the best rounds of both, which other work on the machine disturbs least."""
    ratios = [one / other for one, other in zip(times[arm], times[against], strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "median": statistics.median(ratios),
        "low": medians[49],
        "high": medians[-50],
        "best": min(times[arm]) / min(times[against]),
    }


class Elsewhere:
    """A process that does a piece of work for every line that it is told, and answers with a line when it is done. It
    runs in the folder that holds `benchmarks`.

    Used with `with`, which gives the function that tells it a line and returns the answer. `environment` is added to
    ours. Raises `RuntimeError` when the process has ended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.command, self.environment = list(command), os.environ | dict(environment or {})

    def __enter__(self) -> Callable[[str], str]:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self._tell

    def _tell(self, line: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("the process of the other arm has ended")
        return answer.strip()

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


def memory_bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads; best of ten. (A matrix-vector product, the pattern of
    decoding, reaches a third of it on some processors.)"""
    large = torch.ones(1 << 26, device=DEVICE)
    return large.nbytes / min(seconds(large.sum) for _ in range(10))


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product; best of ten."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a = torch.ones(size, size, device=DEVICE, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(10))


def environment() -> dict[str, object]:
    """What the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import transformers

        versions["transformers"] = transformers.__version__
    except ImportError:
        pass
    return {
        **versions,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in named.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} ({', '.join(flags)})"
