"""Time of writing one sequence, greedily: the controller against the static twin, and against transformers' `generate`.

python -m benchmarks.decode
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.arms import OURS, gpt2, our_model
from benchmarks.measure import DEVICE, PRECISIONS, interleaved, memory_bandwidth, ratio
from ncn import ModulatedTransformer
from ncn.inference.decoding import generate_tokens

PRESET = "published-18m"
PROMPT, NEW = 32, 128


def measure(precision: str, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Tokens a second of every arm, their ratios, and the share of the memory's bandwidth that the weights take.

    `compiled`: our steps are compiled, and GPT-2 writes both as it is and with its forward pass compiled.
    """
    dtype = PRECISIONS[precision]
    prompt = torch.randint(1000, (PROMPT,)).tolist()
    ours = {name: our_model(PRESET, name).to(dtype).eval() for name in OURS}
    arms = {name: _ours(model, prompt, compiled) for name, model in ours.items()}
    arms["gpt2"] = _theirs(gpt2(PRESET).to(dtype).eval(), prompt)
    if compiled:
        faster = gpt2(PRESET).to(dtype).eval()
        faster.forward = torch.compile(faster.forward, dynamic=True)
        arms["gpt2 compiled"] = _theirs(faster, prompt)
    times = interleaved(arms, rounds, warmup=1)
    limit = _bytes_per_token(ours["ncn"]) / memory_bandwidth()
    return {
        "preset": PRESET,
        "precision": precision,
        "compiled": compiled,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rounds": rounds,
        "tokens_per_second": {name: NEW / statistics.median(taken) for name, taken in times.items()},
        "time_against_static_twin": ratio(times, "ncn", "static twin"),
        "time_against_no_controller": ratio(times, "ncn", "no controller"),
        "speed_against_gpt2": ratio(times, "gpt2", "ncn"),
        "speed_against_gpt2_compiled": ratio(times, "gpt2 compiled", "ncn") if compiled else None,
        "limit_tokens_per_second": 1 / limit,
        "share_of_limit": NEW * limit / statistics.median(times["ncn"]),
    }


def _ours(model: ModulatedTransformer, prompt: list[int], compiled: bool) -> Callable[[], None]:
    def write() -> None:
        assert len(list(generate_tokens(model, prompt, max_tokens=NEW, temperature=0, compile=compiled))) == NEW

    return write


def _theirs(model: Any, prompt: list[int]) -> Callable[[], None]:
    ids = torch.tensor([prompt], device=DEVICE)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def write() -> None:
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert written.shape[1] == PROMPT + NEW

    return write


def _bytes_per_token(model: ModulatedTransformer) -> int:
    """Every weight once, but for the table of positions, and the keys and values of half the final length."""
    config = model.config
    skipped = 0 if model.position_embedding is None else model.position_embedding.weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - skipped
    width = 2 * config.kv_heads * config.head_dim * config.num_layers
    return weights + width * (PROMPT + NEW // 2) * model.output_weight.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--steps", type=int, default=5, help="measured sequences of each arm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the steps; takes minutes")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for key, value in measure(options.precision, options.steps, options.compile).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
