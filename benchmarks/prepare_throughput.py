"""Throughput of `prepare` with GPT-2's tokenizer on the bundled TinyStories sample, against the tokenizers library
alone.

Both do the same documents in the same process, alternating; `prepare` also unpacks, checks, lays out, hashes and
writes them. The library's own `encode_batch` (threads of its own, the whole list in one call) gets its documents
ready-made.

    python -m benchmarks.prepare_throughput
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, seconds
from ncn.data.manifest import Manifest
from ncn.data.prepare import prepare
from ncn.data.sources import open_source
from ncn.data.tokenizer import Tokenizer
from ncn.machine.devices import usable_cores

SAMPLE = "tinystories-sample"


def measure(rounds: int, source: str = SAMPLE) -> dict[str, Any]:
    """Tokens a second of both arms, bytes of text a second of `prepare`, and its speed in units of the library's."""
    documents = [piece.text for piece in open_source(source, "text", "train").pieces()]
    times: dict[str, list[float]] = {"tokenizers": [], "prepare": []}
    tokens = size = 0
    for _ in range(rounds):
        times["tokenizers"].append(_library(documents))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "data"
            times["prepare"].append(seconds(functools.partial(prepare, [source], out, tokenizer="gpt2")))
            manifest = Manifest.read(out)
        tokens, size = manifest.tokens, manifest.text_bytes
    return {
        "source": source,
        "documents": len(documents),
        "workers": usable_cores(),
        "rounds": rounds,
        "tokens_per_second": {name: tokens / statistics.median(taken) for name, taken in times.items()},
        "bytes_per_second": size / statistics.median(times["prepare"]),
        "speed_against_tokenizers": ratio(times, "tokenizers", "prepare"),
    }


def _library(documents: list[str]) -> float:
    """Seconds that the library takes with a new tokenizer, whose cache of words is empty as that of `prepare` is."""
    backend = Tokenizer.load("gpt2").backend
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return seconds(lambda: backend.encode_batch(documents, add_special_tokens=False))
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured rounds of each arm")
    for key, value in measure(parser.parse_args().steps).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
