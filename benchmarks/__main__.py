"""Run every benchmark, and write `benchmarks/results.json` and the tables of `benchmarks/README.md`.

python -m benchmarks [--steps N] [--only PART]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode, memory, prepare_throughput, train_step
from benchmarks.measure import environment

HERE = Path(__file__).parent
MARK = "<!-- measured: what follows is written by python -m benchmarks -->"
PRECISIONS = ("bfloat16", "float32")

PARTS = ("train", "decode", "memory", "prepare")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured rounds of each benchmark")
    parser.add_argument("--only", choices=PARTS, help="measure this part, and keep the stored numbers of the others")
    options = parser.parse_args(arguments)
    rounds, file = options.steps, HERE / "results.json"
    results: dict[str, Any] = {"environment": environment()}
    if options.only:
        results = json.loads(file.read_text("utf-8"))
    for part in [options.only] if options.only else PARTS:
        results[part] = _measured(part, rounds)
    file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    page = HERE / "README.md"
    page.write_text(page.read_text("utf-8").split(MARK)[0] + MARK + "\n\n" + tables(results), "utf-8")


def _measured(part: str, rounds: int) -> Any:
    if part == "prepare":
        return _told(prepare_throughput.measure(max(rounds // 2, 1)))
    if part == "memory":
        arms = ("ncn", "static twin", "gpt2")
        return {
            precision: _told({arm: memory.measure(arm, "published-18m", precision) for arm in arms})
            for precision in PRECISIONS
        }
    if part == "decode":
        return [
            _told(decode.measure(precision, rounds, compiled)) for compiled in (False, True) for precision in PRECISIONS
        ]
    return [
        _told(train_step.measure(preset, precision, rounds))
        for precision in PRECISIONS
        for preset in ("mini", "published-18m")
    ]


def tables(results: Mapping[str, Any]) -> str:
    """The measured part of the README, as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = [
        f"Measured on: {facts}.",
        "",
        "A ratio is the median over rounds, with a 95 % interval from rounds drawn again.",
        "",
        "| training step | precision | tokens/s | time against the static twin | against no controller "
        "| speed against GPT-2 | share of the matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['preset']}` | {row['precision']} | {row['tokens_per_second']['ncn']:,.0f} "
        f"| {_overhead(row['time_against_static_twin'])} | {_overhead(row['time_against_no_controller'])} "
        f"| {_speed(row.get('speed_against_gpt2'))} "
        f"| {row['share_of_limit']:.0%} |"
        for row in results["train"]
    ]
    lines += [
        "",
        "| decoding `published-18m` | tokens/s | time against the static twin | against no controller "
        "| speed against GPT-2 | against GPT-2, compiled | share of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['precision']}{', compiled' if row['compiled'] else ''} | {row['tokens_per_second']['ncn']:,.0f} "
        f"| {_overhead(row['time_against_static_twin'])} "
        f"| {_overhead(row['time_against_no_controller'])} | {_speed(row['speed_against_gpt2'])} "
        f"| {_speed(row['speed_against_gpt2_compiled'])} | {row['share_of_limit']:.0%} |"
        for row in results["decode"]
    ]
    lines += [
        "",
        "| peak memory of training `published-18m` | NCN | static twin | GPT-2 | NCN / GPT-2 |",
        "|---|---|---|---|---|",
    ]
    for precision, row in results["memory"].items():
        sizes = " | ".join(f"{row[arm] / 2**20:,.0f} MiB" for arm in ("ncn", "static twin", "gpt2"))
        lines.append(f"| {precision} | {sizes} | {row['ncn'] / row['gpt2']:.2f} |")
    row = results["prepare"]
    lines += [
        "",
        "| preparing text | million tokens/s | MB/s | the tokenizers library alone, million tokens/s | against it |",
        "|---|---|---|---|---|",
        f"| {row['documents']:,} documents, {row['workers']} threads | {row['tokens_per_second']['prepare'] / 1e6:.2f} "
        f"| {row['bytes_per_second'] / 1e6:.1f} | {row['tokens_per_second']['tokenizers'] / 1e6:.2f} "
        f"| {_speed(row['speed_against_tokenizers'])} |",
    ]
    return "\n".join(lines) + "\n"


def _overhead(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median'] - 1:+.1%} ({ratio['low'] - 1:+.1%} to {ratio['high'] - 1:+.1%})"


def _speed(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f}× ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _told(result: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
