"""Time of a training step: the controller against the static twin, and both against transformers' GPT-2.

python -m benchmarks.train_step --preset mini --precision bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks.arms import OURS, batch, training_flops, training_step
from benchmarks.measure import DEVICE, PRECISIONS, Elsewhere, interleaved, matmul_rate, ratio, seconds

SEQUENCES = {"mini": 16, "published-18m": 4}
WITH_GPT2 = {"published-18m"}
TURNS = {"mini": 6}
"""Measured steps for each one asked for: short steps differ more, and cost less to repeat."""


def measure(preset: str, precision: str, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Seconds a step of every arm, their ratios, and the share of the machine's matrix rate that the products reach."""
    sequences = _sequences(preset)
    data = batch(preset, sequences)
    arms = {name: training_step(name, preset, data, precision, compiled) for name in OURS}
    rounds *= TURNS.get(preset, 1)
    if preset in WITH_GPT2:
        with elsewhere("gpt2", preset, precision, compiled) as tell:
            times = interleaved({**arms, "gpt2": lambda: tell("step")}, rounds)
    else:
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
        "time_against_static_twin": ratio(times, "ncn", "static twin"),
        "time_against_no_controller": ratio(times, "ncn", "no controller"),
        "limit_milliseconds": 1e3 * limit,
        "share_of_limit": limit / statistics.median(times["ncn"]),
    }
    if "gpt2" in times:
        result["speed_against_gpt2"] = ratio(times, "gpt2", "ncn")
    return result


def elsewhere(arm: str, preset: str, precision: str, compiled: bool) -> Elsewhere:
    """Steps of an arm in a process of its own, where memory is managed as it is without us."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--serve", arm, "--preset", preset]
    command += ["--precision", precision, "--threads", str(torch.get_num_threads())]
    return Elsewhere(command + (["--compile"] if compiled else []))


def serve(arm: str, preset: str, precision: str, compiled: bool) -> None:
    """Make a step for every line that is read."""
    step = training_step(arm, preset, batch(preset, _sequences(preset)), precision, compiled)
    for _ in sys.stdin:
        seconds(step)
        print("done", flush=True)


def _sequences(preset: str) -> int:
    return SEQUENCES.get(preset, 4) * (8 if DEVICE.type == "cuda" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each arm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--serve", metavar="ARM", help="make a step of this arm for every line of standard input")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options.preset, options.precision, options.compile)
        return
    for key, value in measure(options.preset, options.precision, options.steps, options.compile).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
