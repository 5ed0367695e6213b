"""The page of `ncn steer`, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncn.pages.page import origin, table, write_page

_ENTER = {
    "controller": "the controller",
    "layers": "the layers",
    "prefix": "a prefix token",
    "embedding": "all input embeddings",
}


def write_steering(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the figures, write the page, and return all paths."""
    from ncn.experiments.steering.figures import draw_comparison, draw_steering

    pictures = [folder / "steer.png", folder / "compare.png"]
    draw_steering(results, pictures[0])
    draw_comparison(results, pictures[1])
    return [*pictures, *write_page(folder / "steer.md", "What the sliders do", steering_page(results))]


def steering_page(results: Mapping[str, Any]) -> str:
    """Markdown without its first heading."""
    models = results["models"]
    several, guided = len(models) > 1, len(results["guidances"]) > 1
    others = "unset" if results["others"] is None else f"at {results['others']:g}"
    if results["mixes"]:
        others = "moved with it, around the middle, such that their own attributes stay where they are"
    times = "once" if results["seeds"] == 1 else f"{results['seeds']} times"
    parts = [
        f"{results['prompts']} beginnings of held-out documents ({results['prompt_tokens']} tokens) were continued "
        f"{times} at each of {len(results['settings'])} values of every slider, the others {others}, "
        f"at temperature {results['temperature']:g}, up to {results['longest']} tokens. What came out was measured and "
        "ranked as the documents are, so that both the slider and the attribute go from 0 to 1.",
        _models(results),
        "## Obedience",
        _obedience(results),
        "*Story by story* the slider competes with everything else that makes stories differ, the prompt and chance "
        "among them; *of the means* asks only whether the seven averages rise in order. A slope of 1 would be perfect "
        "obedience. Intervals (95 %) are over prompts."
        + (
            " *First − this* is the correlation of the first model minus that of this one, on the same prompts."
            if several
            else ""
        )
        + (" Guidance extrapolates from the model without sliders to the model with them." if guided else ""),
        "![The attribute that each slider is named after](compare.png)",
        "## Leakage",
        _leakage(results),
        "*Leakage* is the correlation of a slider with another attribute, the strongest of them. Attributes go "
        "together in the corpus too: stories with more dialogue have more questions. *Beyond the corpus* is what "
        "remains when the product of the slider's own correlation and the two attributes' correlation in the corpus is "
        "taken off; of sliders that were learned on balanced documents that says nothing.",
        "![All attributes against each slider](steer.png)",
        *(_mix(results, guidance) for guidance in results["mixes"] or {}),
        "## What the text is like",
        _text(results),
        _text_note(results),
        "## What the sliders are worth as information",
        _losses(results),
        f"Nats a token over the same {results['loss_tokens']:,} tokens of held-out text, with the sliders of each "
        "document, with those of another one, and unset; intervals are over windows of text, and do not hold what "
        "another seed of training would change.",
        origin(results["environment"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _cells(results: Mapping[str, Any]) -> list[tuple[list[str], str, dict[str, Any]]]:
    """The first cells of a row, the model, and what was found: by slider, then by model, then by guidance."""
    several, guided = len(results["models"]) > 1, len(results["guidances"]) > 1
    sliders = list(next(iter(results["models"].values()))["sliders"])
    return [
        (
            [name, *([label] if several else []), *([guidance] if guided else [])],
            label,
            model["sliders"][name][guidance],
        )
        for name in sliders
        for label, model in results["models"].items()
        for guidance in results["guidances"]
    ]


def _head(results: Mapping[str, Any], *rest: str) -> list[str]:
    model = ["model"] if len(results["models"]) > 1 else []
    return ["slider", *model, *(["guidance"] if len(results["guidances"]) > 1 else []), *rest]


def _models(results: Mapping[str, Any]) -> str:
    rows = [
        [label, _ENTER[model["enter"]], f"{model['kind']}", f"{model['parameters']:,}"]
        for label, model in results["models"].items()
    ]
    return table(["model", "sliders enter", "signals", "parameters"], rows)


def _obedience(results: Mapping[str, Any]) -> str:
    several = len(results["models"]) > 1
    rows = []
    for first, _, found in _cells(results):
        row = [
            *first,
            _with_interval(found["spearman"]),
            _signed(found["spearman_of_means"]),
            _with_interval(found["slope"]),
        ]
        if several:
            row.append(_with_interval(found["first_minus_this"]) if "first_minus_this" in found else "–")
        rows.append(row)
    head = ["Spearman, story by story", "of the means", "slope", *(["first − this"] if several else [])]
    return table(_head(results, *head), rows)


def _leakage(results: Mapping[str, Any]) -> str:
    rows = []
    for first, _, found in _cells(results):
        leaks = found["leakage"]
        strongest = [max(leaks, key=lambda name: abs(leaks[name][kind]), default=None) for kind in _KINDS]
        rows.append(
            [
                *first,
                *(
                    "–" if name is None else f"{_signed(leaks[name][kind])} ({name})"
                    for kind, name in zip(_KINDS, strongest, strict=True)
                ),
                f"{sum(abs(leak['value']) for leak in leaks.values()) / max(len(leaks), 1):.2f}",
            ]
        )
    return table(_head(results, "strongest leakage", "strongest beyond the corpus", "mean size of leakage"), rows)


_KINDS = ("value", "beyond_corpus")


def _mix(results: Mapping[str, Any], guidance: str) -> str:
    names = list(next(iter(results["models"].values()))["sliders"])
    rows = [
        [
            name,
            *("" if row == column else _signed(results["mixes"][guidance][row][column]) for row in range(len(names))),
        ]
        for column, name in enumerate(names)
    ]
    return (
        f"With guidance {guidance}, a slider (a row) that goes from 0 to 1 takes the others with it by this much, up "
        "to their ends, which an earlier measurement said would leave their attributes where they are:\n\n"
        + table(["slider", *names], rows)
    )


def _text(results: Mapping[str, Any]) -> str:
    real, judged = results["real"], "bits_per_byte" in results["real"]
    rows = []
    for first, _, found in _cells(results):
        row = [*first, *(_range(values) for values in found["distinct"].values())]
        if judged:
            row.append(_range(found["bits_per_byte"], 3))
        rows.append([*row, f"{max(found['cut']):.1%}"])
    blank = [""] * (len(rows[0]) - 1)
    own = [f"{value:.2f}" for value in real["distinct"].values()]
    if judged:
        own.append(f"{real['bits_per_byte']:.3f}")
    rows.append(["(the documents themselves)", *blank[: len(blank) - len(own) - 1], *own, "–"])
    head = [*(f"distinct-{run}" for run in real["distinct"]), *(["bits per byte"] if judged else []), "cut off"]
    return table(_head(results, *head), rows)


def _text_note(results: Mapping[str, Any]) -> str:
    judge = (
        " *Bits per byte* are those of an independent model without sliders reading the stories of the first seed: "
        "fluency, lower is more fluent, and also more ordinary."
        if "bits_per_byte" in results["real"]
        else ""
    )
    return (
        "The least and the most over the values of the slider. *Distinct-n* is the share of different runs of n "
        f"tokens, over equally many tokens at every value.{judge} *Cut off* is the largest share of stories that the "
        "context ended."
    )


def _losses(results: Mapping[str, Any]) -> str:
    without = list(results["without"])
    rows = []
    for label, model in results["models"].items():
        loss = model["loss"]
        rows.append(
            [
                label,
                *(f"{loss[kind]:.4f}" for kind in ("right", "unset", "wrong")),
                _with_interval(model["right_against_unset"], 4),
                *(
                    _with_interval(model["unset_against"][other], 4) if other in model["unset_against"] else "–"
                    for other in without
                ),
            ]
        )
    dashes = ["–"] * (1 + len(without))
    rows += [[f"{label} (no sliders)", "–", f"{loss:.4f}", "–", *dashes] for label, loss in results["without"].items()]
    return table(["model", "right", "unset", "wrong", "right − unset", *(f"unset − {name}" for name in without)], rows)


def _with_interval(found: Mapping[str, float], digits: int = 2) -> str:
    return f"{_signed(found['value'], digits)} [{_signed(found['low'], digits)}, {_signed(found['high'], digits)}]"


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _range(values: list[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
