"""Peak memory of training: how far a process grows over three steps, model and optimiser included.

Every arm has processes of its own, for memory that one arm has touched stays with its process; and several of them,
for equal ones differ by up to a tenth.

    python -m benchmarks.memory ncn --preset published-18m --precision bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.arms import batch, training_step
from benchmarks.measure import DEVICE, PRECISIONS
from benchmarks.train_step import SEQUENCES

STEPS = 3
PROCESSES = 3


def measure(arm: str, preset: str, precision: str) -> int:
    """Bytes of peak growth, the median over new processes."""
    command = [sys.executable, "-m", "benchmarks.memory", arm, "--preset", preset, "--precision", precision]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PROCESSES)]
    return statistics.median_low(int(run.stdout.split()[-1]) for run in runs)


def growth(arm: str, preset: str, precision: str) -> int:
    if arm == "gpt2":
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - its own size is not the model's
    before = _resident("VmRSS") if DEVICE.type == "cpu" else 0
    step = training_step(arm, preset, batch(preset, SEQUENCES.get(preset, 4)), precision)
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=["ncn", "static twin", "gpt2"])
    parser.add_argument("--preset", default="published-18m")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    options = parser.parse_args()
    print(growth(options.arm, options.preset, options.precision))


if __name__ == "__main__":
    main()
