"""Throughput of `prepare` with GPT-2's tokenizer on the bundled TinyStories sample, against the tokenizers library
alone.

Both do the same documents in the same process, alternating; `prepare` also unpacks, checks, lays out, hashes and
writes them. The library's own `encode_batch` (threads of its own, the whole list in one call) gets its documents
ready-made.

    python benchmarks/prepare_throughput.py
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "true"

import statistics
import tempfile
import time
from pathlib import Path

from ncn.prepare import prepare
from ncn.sources import open_source
from ncn.tokenizer import Tokenizer

SAMPLE = "tinystories-sample"
ROUNDS = 5


def main() -> None:
    documents = [piece.text for piece in open_source(SAMPLE, "text", "train").pieces()]
    library, whole = [], []
    for _ in range(ROUNDS):
        tokenizer = Tokenizer.load("gpt2")
        begun = time.perf_counter()
        tokens = sum(map(len, tokenizer.backend.encode_batch(documents, add_special_tokens=False)))
        library.append(tokens / (time.perf_counter() - begun) / 1e6)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            manifest = prepare([SAMPLE], Path(folder) / "data", tokenizer="gpt2")
            whole.append(manifest.tokens / (time.perf_counter() - begun) / 1e6)
        assert manifest.tokens == tokens + manifest.documents
    print(f"{'M tokens/s':24}{'median':>8}{'best':>8}")
    print(f"{'tokenizers encode_batch':24}{statistics.median(library):8.2f}{max(library):8.2f}")
    print(f"{'prepare, start to end':24}{statistics.median(whole):8.2f}{max(whole):8.2f}")
    ratio, best = statistics.median(whole) / statistics.median(library), max(whole) / max(library)
    print(f"ratio: {ratio:.2f} (median), {best:.2f} (best)")


if __name__ == "__main__":
    main()
