"""Time of a training step: the controller against the static twin, and both against transformers' GPT-2.

python -m benchmarks.train_step --preset mini --precision bfloat16
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.arms import batch, training_flops, training_step
from benchmarks.measure import DEVICE, PRECISIONS, interleaved, matmul_rate, ratio

SEQUENCES = {"mini": 16, "published-18m": 4}
WITH_GPT2 = {"published-18m"}
TURNS = {"mini": 6}
"""Measured steps for each one asked for: short steps differ more, and cost less to repeat."""


def measure(preset: str, precision: str, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Seconds a step of every arm, their ratios, and the share of the machine's matrix rate that the products reach."""
    sequences = SEQUENCES.get(preset, 4) * (8 if DEVICE.type == "cuda" else 1)
    data = batch(preset, sequences)
    names = ["static twin", "ncn", *(["gpt2"] if preset in WITH_GPT2 else [])]
    arms = {name: training_step(name, preset, data, precision, compiled) for name in names}
    rounds *= TURNS.get(preset, 1)
    times = interleaved(arms, rounds)
    tokens = data[0].numel()
    limit = training_flops(preset, sequences) / matmul_rate(PRECISIONS[precision])
    result: dict[str, Any] = {
        "preset": preset,
        "precision": precision,
        "compiled": compiled,
        "batch": list(data[0].shape),
        "rounds": rounds,
        "milliseconds": {name: 1e3 * statistics.median(taken) for name, taken in times.items()},
        "tokens_per_second": {name: tokens / statistics.median(taken) for name, taken in times.items()},
        "controller_overhead": ratio(times, "ncn", "static twin"),
        "limit_milliseconds": 1e3 * limit,
        "share_of_limit": limit / statistics.median(times["ncn"]),
    }
    if "gpt2" in times:
        result["speed_against_gpt2"] = ratio(times, "gpt2", "ncn")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each arm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for key, value in measure(options.preset, options.precision, options.steps, options.compile).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
