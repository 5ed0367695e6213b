"""Is this checkout slower than another one? Both do the same work in turns, in one run.

python -m benchmarks.versions OTHER_CHECKOUT

A training step of `mini`, decoding with the bundled `stories-mini`, and the start of the command. A ratio is the time
of this checkout over that of the other: above 1, this one is slower. Each works in a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import DEVICE, ROOT, Elsewhere, interleaved, ratio, seconds

BATCH, CONTEXT = 8, 256
PROMPT, NEW = 16, 48


def measure(
    other: Path, rounds: int = 30, warmup: int = 3, only: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield, work by work, its name, the ratio of the two checkouts as in `measure.ratio`, and the milliseconds that
    this one takes at best. `only` names some of `WORKS` and `STARTS`."""
    checkouts = {"this": ROOT, "other": other}
    with ExitStack() as stack:
        asked = [name for name in WORKS if only is None or name in only]
        tells = {name: stack.enter_context(_worker(root)) for name, root in checkouts.items()} if asked else {}
        for work in asked:
            arms: dict[str, Callable[[], object]] = {name: partial(tell, work) for name, tell in tells.items()}
            yield work, _compared(arms, rounds, warmup)
    for work, arguments in STARTS.items():
        if only is None or work in only:
            arms = {name: partial(_start, root, arguments) for name, root in checkouts.items()}
            yield work, _compared(arms, rounds, warmup)


def _compared(arms: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, float]:
    times = interleaved(arms, rounds, warmup)
    return {**ratio(times, "this", "other"), "milliseconds": 1e3 * min(times["this"])}


def _environment(root: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _start(root: Path, arguments: Sequence[str]) -> None:
    """A whole process, from its start to its end."""
    environment = os.environ | _environment(root)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)


def _worker(root: Path) -> Elsewhere:
    command = [sys.executable, "-m", "benchmarks.versions", str(root), "--serve"]
    return Elsewhere(command, _environment(root))


def serve(root: Path) -> None:
    """With the package of `root`, do the work that each line of standard input names, and say so when it is done."""
    import ncn

    assert Path(str(ncn.__file__)).is_relative_to(root), f"{ncn.__file__} is not of {root}"
    torch.set_num_threads(1)
    _module("machine.memory", "memory").keep_freed_memory()
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        work = line.strip()
        if work not in ready:
            torch.manual_seed(0)
            ready[work] = WORKS[work]()
        seconds(ready[work])
        print("done", flush=True)


def _training(precision: str) -> Callable[[], None]:
    """A step on random tokens: loss, backward, clipping, and the recipe's optimisers."""
    import ncn

    model = ncn.ModulatedTransformer(ncn.NCNConfig.preset("mini")).to(DEVICE)
    settings = ncn.Recipe.preset("mini").train
    optimizers = _module("training.optimizers", "optimizers").build_optimizers(model, settings)
    ids = torch.randint(model.config.vocab_size, (BATCH, CONTEXT + 1), device=DEVICE)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total, _ = model.loss(inputs, targets, chunk=settings.loss_chunk)
        (total / targets.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _decoding(**sampling: float) -> Callable[[], None]:
    """One sequence; sampled tokens may differ between checkouts, their number does not."""
    import ncn
    from ncn.generate import generate_tokens

    model = ncn.load("stories-mini")[0].to(DEVICE)
    prompt = torch.randint(model.config.vocab_size, (PROMPT,)).tolist()

    def write() -> None:
        assert len(list(generate_tokens(model, prompt, max_tokens=NEW, seed=1, **sampling))) == NEW

    return write


def _module(*names: str) -> Any:
    """The first of these modules of the package that the checkout has: other checkouts have other folders."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"ncn.{name}")
    raise ImportError(f"none of {', '.join(names)} in this checkout")


WORKS: dict[str, Callable[[], Callable[[], None]]] = {
    "training step, float32": partial(_training, "float32"),
    "training step, bfloat16": partial(_training, "bfloat16"),
    "decoding, greedy": partial(_decoding, temperature=0),
    "decoding, sampled": partial(_decoding, temperature=0.8, top_p=0.95),
}
"""What a worker does; each builds what it needs and returns the piece that is timed."""
STARTS = {"ncn --help": ("-m", "ncn", "--help"), "import ncn": ("-c", "import ncn")}
"""Arguments of Python, whose whole processes are timed."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="the root of the other checkout")
    parser.add_argument("--rounds", type=int, default=30, help="measured turns of each checkout")
    parser.add_argument("--only", action="append", choices=[*WORKS, *STARTS], help="measure this; may be repeated")
    parser.add_argument("--serve", action="store_true", help="do the work that each line of standard input names")
    options = parser.parse_args(arguments)
    other = options.other.resolve()
    if not (other / "src" / "ncn").is_dir():
        raise SystemExit(f"{options.other} has no package in src/ncn: give the root of a checkout")
    if options.serve:
        serve(other)
        return
    for work, found in measure(other, options.rounds, only=options.only):
        print(
            f"{work}: this / other {found['median']:.3f}, 95 % interval {found['low']:.3f} to {found['high']:.3f}, "
            f"best rounds {found['best']:.3f}; this takes {found['milliseconds']:.1f} ms at best",
            flush=True,
        )


if __name__ == "__main__":
    main()
