"""Experiment folders without experiments: what `ncn ab` leaves behind, with planted differences between the arms."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LABELS = {
    "baseline": ("widened baseline", "baseline"),
    "static": ("static signals", "control"),
    "local": ("local gates", "control"),
    "ncn": ("NCN", "ncn"),
    "ncn-without-gain": ("NCN without gain", "ablation"),
    "ncn-without-head_gate": ("NCN without head_gate", "ablation"),
    "baseline-again": ("widened baseline, again", "again"),
}
RATES = {"0.5": 0.02, "1": 0.0, "2": 0.05}
TOKENS, STEPS, POINTS = 2_000_000, 1000, 20


def make_experiment(
    folder: Path,
    effects: Mapping[str, float] | None = None,
    *,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    noise: float = 0.01,
    documents: int = 60,
    diverged: Sequence[tuple[str, int]] = (),
    unfinished: Sequence[tuple[str, int]] = (),
    flops: Mapping[str, float] | None = None,
    best_rates: Mapping[str, str] | None = None,
    random_seed: int = 0,
) -> Path:
    """Write an experiment whose arms differ by `effects` (nats per token) and, from seed to seed, by `noise`."""
    generator = np.random.default_rng(random_seed)
    effects = effects if effects is not None else dict.fromkeys(("baseline", "static", "local", "ncn"), 0.0)
    tokens = generator.integers(80, 400, documents)
    sizes = (tokens * generator.uniform(3.5, 4.5, documents)).astype(np.int64)
    hardness = generator.normal(0, 0.3, documents)
    write(
        folder / "experiment.json",
        {
            "format": 1,
            "command": ["ncn", "ab", "--preset", "mini", "--seeds", str(len(seeds))],
            "environment": {"device": "a processor", "torch": "2.11.0", "commit": "0123456789abcdef", "dirty": False},
            "preset": "mini",
            "tokens_per_run": TOKENS,
            "steps": STEPS,
            "data": {
                "train": "a", "tuning": "b", "validation": "c", "validation_tokens": int(tokens.sum()),
                "validation_text_bytes": int(sizes.sum()), "validation_documents": documents,
            },
            "seeds": list(seeds),
            "pilot_seed": 0,
            "rates": {"start": [0.5, 1, 2], "factor": 2.0},
            "arms": {
                name: {
                    "label": LABELS[name][0],
                    "role": LABELS[name][1],
                    "recipe": {"model": {}, "train": {"eval_tokens": 10**9}},
                    "parameters": 1_080_000,
                    "flops_per_token": (flops or {}).get(name, 2e6),
                    "seconds_per_step": 0.1 * (flops or {}).get(name, 2e6) / 2e6,
                }
                for name in effects
            },
        },
    )  # fmt: skip
    best = best_rates or {}
    write(
        folder / "tuning.json",
        {
            name: {
                "losses": {rate: 2.0 + effect + extra for rate, extra in RATES.items()} | {"4": None},
                "best": best.get(name, "1"),
            }
            for name, effect in effects.items()
            if LABELS[name][1] != "again"  # the twin takes the baseline's rate
        },
    )
    for seed in seeds:
        common = generator.normal(0, noise)
        for name, effect in effects.items():
            run = folder / "runs" / name / f"seed-{seed}"
            run.mkdir(parents=True)
            if (name, seed) in unfinished:
                continue
            if (name, seed) in diverged:
                write(run / "summary.json", {"diverged": True})
                continue
            level = effect + common + generator.normal(0, noise)
            at = np.linspace(TOKENS / POINTS, TOKENS, POINTS)
            curve = 1.6 + 1.2 * (at / 100_000) ** -0.5 + level + generator.normal(0, 0.001, POINTS)
            lines = [
                {"step": round(t / TOKENS * STEPS), "tokens": int(t), "loss": loss + 0.01, "validation_loss": loss}
                for t, loss in zip(at.tolist(), curve.tolist(), strict=True)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            nats = tokens * (curve[-1] + hardness + generator.normal(0, 0.02, documents))
            save_file({"nats": nats, "tokens": tokens, "bytes": sizes}, run / "documents.safetensors")
            write(run / "summary.json", {"validation_loss": curve[-1], "batches_sha256": f"batches of seed {seed}"})
    return folder


def write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
