"""The report of `ncn adapt`: summary.json, a page in Markdown and HTML, and its figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncn.errors import UserError
from ncn.experiments.adaptation.lesson import TUNING_SEED
from ncn.machine.environment import command_words
from ncn.machine.files import read_json, write_json
from ncn.pages.numbers import NBSP, interval_text, p_text
from ncn.pages.page import origin, table, write_page
from ncn.retrofit.adapters import LABELS, Method
from ncn.statistics.seeds import ResampledLosses, entry, holm

DOMAINS = ("new", "old")


@dataclass(frozen=True)
class AdaptationReport:
    """What the experiment says, and the files that say more."""

    sentence: str
    files: list[Path]


def write_report(folder: Path, methods: Sequence[Method], seeds: Sequence[int]) -> AdaptationReport:
    """Write the report of a finished experiment to its subfolder report/.

    Raises `UserError` where runs that are compared with each other did not read the same batches.
    """
    facts, costs = read_json(folder / "adaptation.json"), read_json(folder / "costs.json")
    runs = [read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    command = shlex.join(command_words())
    summary = summarise(facts, runs, methods, seeds) | {"costs": costs, "command": command}
    from ncn.experiments.adaptation.figures import draw_trade
    from ncn.lab.figures import Difference, differences, rate_sweep

    out = folder / "report"
    out.mkdir(exist_ok=True)
    draw_trade(summary["methods"], out / "trade.png")
    rate_sweep(
        {
            f"{LABELS[method]}, 1 = {facts['centres'][method]:g}": {float(m): x for m, x in found["tuning"].items()}
            for method, found in summary["methods"].items()
        },
        out / "rates.png",
        one="the method's own",
    )
    files = [out / "summary.json", out / "trade.png", out / "rates.png"]
    if summary["differences"]:
        rows = [
            Difference(f"NCN − {LABELS[row['other']]}", f"on the {domain} domain", **{
                key: row[domain][key] for key in ("mean", "low", "high", "per_seed")
            })
            for domain in DOMAINS
            for row in summary["differences"]
        ]  # fmt: skip
        differences(rows, out / "differences.png")
        files.append(out / "differences.png")
    write_json(out / "summary.json", summary)
    pages = write_page(out / "adaptation.md", "A controller and other adapters on text of another kind", _page(summary))
    return AdaptationReport(summary["sentence"], [*files, *pages])


def summarise(
    facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], methods: Sequence[Method], seeds: Sequence[int]
) -> dict[str, Any]:
    """Everything that the page says but the costs, ready for JSON.

    Losses are in bits per byte; `gained` is by how much the new domain's fell, `lost` by how much the old one's rose,
    and `differences` are the NCN's loss less that of each other method.
    """
    compared = {(run["method"], run["seed"]): run for run in _best_runs(facts, runs, methods, seeds)}
    diverged = [f"{method} with seed {seed}" for (method, seed), run in compared.items() if run["diverged"]]
    if diverged:
        raise UserError(
            f"diverged at the rate that was best in tuning: {', '.join(diverged)}; lower it, or train longer"
        )
    for seed in seeds:
        if len({compared[method, seed]["batches_sha256"] for method in methods}) > 1:
            raise UserError(f"the runs with seed {seed} did not read the same batches; start the experiment anew")
    place = {key: index for index, key in enumerate(compared)}
    rows = {method: [place[method, seed] for seed in seeds] for method in methods}
    base = [len(compared)] * len(seeds)
    found: dict[str, Any] = {method: {} for method in methods}
    differences: dict[str, Any] = {method: {"other": method} for method in methods if method != "ncn"}
    levels = {}
    for domain in DOMAINS:
        before = facts["losses"][domain]
        nats = np.array([*(run["losses"][domain] for run in compared.values()), before["nats"]])
        losses = ResampledLosses(nats, before["bytes"], before["tokens"])
        levels[domain] = float(losses.values["bits_per_byte"][-1])
        for method in methods:
            pair = (base, rows[method]) if domain == "new" else (rows[method], base)
            change = entry(*losses.difference("bits_per_byte", *pair))
            level = float(losses.values["bits_per_byte"][rows[method]].mean())
            found[method] |= {f"{domain}_level": level, "gained" if domain == "new" else "lost": change}
            if "ncn" in methods and method != "ncn":
                differences[method][domain] = entry(*losses.difference("bits_per_byte", rows["ncn"], rows[method]))
    pairs = list(differences.values()) if "ncn" in methods else []
    _correct(pairs)
    for method in methods:
        one = compared[method, seeds[0]]
        tuned = [run for run in runs if run["method"] == method and run["seed"] == TUNING_SEED]
        found[method] |= {
            "label": LABELS[method],
            "dial": facts["dials"].get(method),
            "parameters": one["parameters"],
            "bytes": one["bytes"],
            "rate": one["rate"],
            "tuning": {f"{run['multiple']:g}": run.get("tuning_loss") for run in tuned},
        }
    return {
        "sentence": _sentence(found, pairs),
        "cautions": [caution for one in found.values() if (caution := _at_edge(one))],
        "methods": found,
        "differences": pairs,
        "base": {"new": levels["new"], "old": levels["old"], "parameters": facts["base_parameters"]},
        "seeds": list(seeds),
        "facts": {name: value for name, value in facts.items() if name != "losses"},
        "texts": {
            domain: {
                "documents": len(facts["losses"][domain]["nats"]),
                "tokens": sum(facts["losses"][domain]["tokens"]),
                "bytes": sum(facts["losses"][domain]["bytes"]),
            }
            for domain in DOMAINS
        },
    }


def _best_runs(
    facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], methods: Sequence[Method], seeds: Sequence[int]
) -> list[Mapping[str, Any]]:
    """The runs that are compared, by method and seed: those at the rate that was best on the tuning split."""
    chosen = []
    for method in methods:
        tuned = [run for run in runs if run["method"] == method and run.get("tuning_loss") is not None]
        best = min(tuned, key=lambda run: run["tuning_loss"])["multiple"]
        key = {(run["method"], run["multiple"], run["seed"]): run for run in runs}
        chosen += [key[method, best, seed] for seed in seeds]
    return chosen


def _at_edge(found: Mapping[str, Any]) -> str | None:
    """What to say where a method's best rate is the lowest or the highest that was tried."""
    losses = {float(multiple): loss for multiple, loss in found["tuning"].items() if loss is not None}
    best = min(losses, key=losses.__getitem__)
    edges = {min(losses): "lowest", max(losses): "highest"}
    if best not in edges:
        return None
    return (
        f"The best learning rate of {found['label']} is the {edges[best]} that was tried, so that it may do better "
        "than it does here."
    )


def _correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Holm's correction of the p-values, for each domain."""
    for domain in DOMAINS:
        tested = [row[domain] for row in pairs if row[domain]["p"] is not None]
        for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["holm_p"] = corrected


def _sentence(methods: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    gains = ", ".join(f"{found['label']} {found['gained']['mean']:.3f}" for found in methods.values())
    text = f"Bits per byte gained on the new domain: {gains}."
    others = {"better than": [], "worse than": [], "not told from": []}  # type: dict[str, list[str]]
    for row in pairs:
        new = row["new"]
        clear = new.get("holm_p") is not None and new["holm_p"] < 0.05
        others["not told from" if not clear else "better than" if new["mean"] < 0 else "worse than"].append(
            LABELS[row["other"]]
        )
    said = [f"{words} {_listed(names)}" for words, names in others.items() if names]
    return text + (f" There the NCN is {', '.join(said)}." if said else "")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _page(summary: Mapping[str, Any]) -> str:
    methods, base, facts = summary["methods"], summary["base"], summary["facts"]
    train, texts = facts["train"], summary["texts"]
    sections = [
        summary["sentence"],
        "A base that stays frozen is put to text of another kind. Below, *gained* is by how many bits per byte the "
        "loss on the new domain fell, and *lost* by how many that on the base's own domain rose; both with 95 % "
        f"intervals over {len(summary['seeds'])} seeds and the documents. The base has {base['parameters']:,} "
        f"parameters and needs {base['new']:.4f} bits per byte on the new domain and {base['old']:.4f} on its own.",
        table(
            ["method", "size", "trained parameters", "rate", "new domain", "gained", "old domain", "lost"],
            [
                [
                    found["label"],
                    found["dial"] or "–",
                    f"{found['parameters']:,}",
                    f"{found['rate']:.2g}",
                    f"{found['new_level']:.4f}",
                    interval_text(found["gained"], short=True),
                    f"{found['old_level']:.4f}",
                    interval_text(found["lost"], short=True),
                ]
                for found in methods.values()
            ],
        ),
        *(f"> {caution}" for caution in summary["cautions"]),
        "![What each method gains on the new domain, against what it loses on the old one](trade.png)",
    ]
    if summary["differences"]:
        sections += ["## NCN against each other method", _differences(summary["differences"]),
                     "![Paired differences](differences.png)"]  # fmt: skip
    sections += [
        "## What it costs",
        _costs(summary),
        "## Learning rates",
        "Each method was tried at multiples of a rate of its own on a tuning split, which was cut from the training "
        "text of the new domain; the grid grew while the best lay at its edge.",
        "![Loss on the tuning split by learning rate](rates.png)",
        "## How it was measured",
        f"Every run read {train['tokens']:,} tokens in batches of {train['batch_size']} windows of {train['context']}; "
        "with equal seeds all methods read the same batches in the same order, which a hash proves. All computed in "
        f"{_arithmetic(facts)}, with AdamW, a cosine schedule, a weight decay of {train['weight_decay']:g}, and the "
        "base in evaluation mode. LoRA, IA3 and prefix tuning are PEFT's, at the modules that it chooses for this "
        "architecture, without dropout. Sizes are matched to LoRA's as nearly as whole numbers allow; IA3 has one "
        "size, and full fine-tuning trains everything. NCN, LoRA and IA3 start as the base; a prefix starts at random "
        f"and disturbs it. Losses are on {texts['new']['documents']:,} documents ({texts['new']['tokens']:,} tokens) "
        f"of the new domain and {texts['old']['documents']:,} ({texts['old']['tokens']:,} tokens) of the old one, "
        "which chose nothing.",
        origin(facts["environment"], summary["command"]),
    ]
    return "\n\n".join(sections)


def _arithmetic(facts: Mapping[str, Any]) -> str:
    kind = str(facts["environment"]["autocast"]).removeprefix("torch.")
    return "float32" if kind == "None" else f"{kind} matrix products over float32 weights"


def _differences(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"NCN − {LABELS[row['other']]}",
            interval_text(row["new"]),
            p_text(row["new"].get("holm_p")),
            interval_text(row["old"]),
            p_text(row["old"].get("holm_p")),
        ]
        for row in pairs
    ]
    return (
        "Differences of the loss in bits per byte; below zero the NCN is better. p-values are corrected for their "
        "number (Holm).\n\n" + table(["pair", "new domain", "p", "old domain", "p"], rows)
    )


def _costs(summary: Mapping[str, Any]) -> str:
    costs, rows = summary["costs"], []
    for name, found in summary["methods"].items():
        step, decoding = costs["step"][name], costs["decoding"][name]
        rows.append(
            [
                found["label"],
                f"{1e3 * step['seconds']:.0f} ms",
                _factor(step["ratio"]),
                f"{decoding['tokens_per_second']:.1f}",
                _factor(decoding["ratio"]),
                f"{found['bytes']:,}",
            ]
        )
    base = costs["decoding"]["base"]["tokens_per_second"]
    return (
        f"In each of {costs['rounds']} rounds every method took one training step and wrote {costs['written']} tokens "
        f"after a prompt of {costs['prompt']} with `generate`, one text at a time; the base wrote {base:.1f} tokens a "
        "second. Ratios are within a round, with 95 % intervals. Fully fine-tuned, the base decodes by the same "
        "computation as before, so that its ratio shows the error of the others'. LoRA and IA3 are measured "
        "beside the weights; merged into them they cost nothing in decoding.\n\n"
        + table(
            [
                "method",
                "training step",
                "of full fine-tuning's",
                "tokens a second",
                "of the base's",
                "bytes saved",
            ],
            rows,
        )
    )


def _factor(ratio: Mapping[str, Any]) -> str:
    ends = "" if ratio["low"] is None else f"{NBSP}[{ratio['low']:.2f},{NBSP}{ratio['high']:.2f}]"
    return f"{ratio['mean']:.2f}{ends}"
