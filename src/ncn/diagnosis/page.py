"""A diagnosis on disk: its numbers as JSON, its figures, and a page that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncn.config.signals import meaning
from ncn.diagnosis.events import CONTRAST_WORDS
from ncn.diagnosis.freezing import WAYS
from ncn.diagnosis.homeostasis import CLOSED
from ncn.errors import UserError
from ncn.machine.files import disk_problem_in_one_line, write_json
from ncn.pages.page import origin, table, write_page
from ncn.scans.scan import Scan

_SHORT = {"surprise_same_token": "surprising, same token"}
_CLEAR = 0.01  # p-values up to here are spoken of as findings
_EVENTS = {
    "surprise": "surprising tokens",
    "surprise_same_token": "surprising tokens, against the same token where it was expected",
    "contrast": "contrast words",
}


def write_diagnosis(results: Mapping[str, Any], scan: Scan | None, folder: Path) -> list[Path]:
    """Write everything to `folder`, which may exist; returns the paths of the page (.md, .html) and of the JSON."""
    from ncn.diagnosis import figures as plot

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder to write to")
    with disk_problem_in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "diagnosis.json", results)
        drawn = {"causal_value.png": plot.causal_values, "layers.png": plot.layer_profiles}
        if any(results["specialisation"].values()):
            drawn["variance.png"] = plot.variance_shares
        if any(results["reactivity"].values()):
            drawn["reactivity.png"] = plot.event_curves
        if results["training"]:
            drawn["training.png"] = plot.signals_over_training
        if results.get("word_order", {}).get("tokens"):
            drawn["word_order.png"] = plot.order_differences
        for name, draw in drawn.items():
            draw(results, folder / name)
        if scan is not None:
            scan.save(folder / "plot_twist.png")
        page = write_page(folder / "diagnosis.md", _title(results), "\n\n".join(_sections(results, scan is not None)))
    return [*page, folder / "diagnosis.json"]


def _title(results: Mapping[str, Any]) -> str:
    return "What the control signals do" + (f": {results['model']}" if results["model"] else "")


def _sections(results: Mapping[str, Any], scanned: bool) -> list[str]:
    parts = [_verdict(results), _how(results), _causal_value(results), _variance(results), _reactivity(results)]
    parts.append(_homeostasis(results))
    if results["training"]:
        parts.append(_training(results))
    if "stereotyping" in results:
        parts.append(_stereotyping(results["stereotyping"]))
    if "word_order" in results:
        parts.append(_examples(results, scanned))
    return [*parts, origin(results["environment"])]


def _verdict(results: Mapping[str, Any]) -> str:
    found = results["verdict"]
    lines = ["\n".join(f"> {sentence}" for sentence in found["sentences"])]
    lines += ["\n".join(f"- **{name}** {sentence}." for name, sentence in found["signals"].items())]
    return "\n\n".join(line for line in lines if line)


def _how(results: Mapping[str, Any]) -> str:
    on = f" of {results['data']}" if results["data"] else ""
    later = results["causality"]["change_from_later_token"]
    causality = (
        "Changing the last token of a text changed nothing before it: the signals are causal."
        if results["causality"]["causal"]
        else "**Not causal.** Changing the last token of a text changed signals before it by up to "
        f"{later['signals']:.2g} of their range and losses by up to {later['loss']:.2g} nats."
    )
    meanings = "".join(f"- **{name}**: {meaning(name, 'a control signal')}\n" for name in results["signals"])
    return f"""## What was measured

A controller sends every layer, for every token, a few numbers, the control signals. Here they were recorded on
{results["tokens"]:,} tokens in {results["documents"]:,} documents{on}; the model's loss there is
{_number(results["loss"])} nats a token. The signals come from {results["source"]}.

{meanings}
Square brackets hold 95 % intervals from a bootstrap over {results["units"]:,} {results["resampled"]}. A p-value is
the share of random rearrangements of the data, in which the effect cannot exist, that show as large an effect; it
cannot fall below 0.001 here. "Standard deviations" are those of the signal over the tokens of this corpus, in its own
layer and head. Many tests were made, so a single p-value just below 0.05 means little. {causality}"""


def _causal_value(results: Mapping[str, Any]) -> str:
    costs = results["causal_value"]
    rows = [
        [_name(label, results), *(_number(ways[way], "+.4f") + _p(ways[way]) for way in WAYS)]
        for label, ways in costs.items()
    ]
    header = ["frozen", "at neutral", "at one mean", "at the mean of each layer and head", "shuffled over tokens"]
    return f"""## Causal value: what the model loses without the signals

The corpus was read again with signals held at given values, and the loss compared, in nats a token. At its *neutral*
value a signal has no effect at all. At *one mean*, its mean over tokens, layers and heads, every layer gets the same.
At the *mean of each layer and head* it keeps all but its movement over tokens: this column is what reading the text
is worth to this model. *Shuffled*, each token gets the signals of another token, with the same distribution. A signal
whose freezing costs nothing is decoration. The model has learned to rely on its signals, so none of this says what a
model trained without them would do.

{table(header, rows)}
![Rise of the loss when signals are frozen](causal_value.png)"""


def _variance(results: Mapping[str, Any]) -> str:
    located = {name: found for name, found in results["specialisation"].items() if found}
    if not located:
        return "## Where the variance lies\n\nThe signals do not vary at all: not over tokens, layers or heads."
    rows = [
        [
            name,
            *(
                _percent(found["shares"][part], digits=1)
                for part in ("layers", "sites", "tokens_alike", "tokens_apart")
            ),
        ]
        for name, found in located.items()
    ]
    for row, found in zip(rows, located.values(), strict=True):
        row[1] += _p(found["shares"]["layers"])
    text = f"""## Specialisation: where the variance lies

The variance of a signal over tokens, layers and heads divides into four parts. *Between layers*: the layers have
different means, each its own job (p: that all layers have the same mean). *Between heads*: the same within a layer.
*Over tokens, alike*: the signal moves from token to token in all layers and heads at once, like a single volume knob.
*Over tokens, apart*: it moves in each layer and head in its own way.

{table(["signal", "between layers", "between heads", "over tokens, alike", "over tokens, apart"], rows)}"""
    picture = "![Where the variance lies and what explains it](variance.png)"
    explained = results["explained"]
    if not explained:
        return f"{text}\n\nNo signal varies over tokens, so there is nothing for the text to explain.\n\n{picture}"
    stages = ("identity", "position", "bag", "unexplained")
    rows = [
        [_name(name, results), *(_percent(found[stage], digits=1) + _p(found[stage]) for stage in stages)]
        for name, found in explained.items()
    ]
    return f"""{text}
## Phasic index: what is left when the order of the words is ignored

How much of a signal's variation over tokens can be predicted from which token it stands on; how much more from the
number of tokens before it; how much more from the bag of words so far, that is, which tokens came and how often, but
not in which order? Predictions were fitted on four fifths of the documents and judged on the others, so a share is a
real prediction (p: that this step adds nothing). What is left, the **phasic index**, needs more than these: the last
few tokens in their order, or the context in some other form. It also holds whatever the predictions were too simple to
find.

{table(["signal", "which token", "+ position", "+ words so far", "left: phasic index"], rows)}
{picture}"""


def _reactivity(results: Mapping[str, Any]) -> str:
    words = ", ".join(CONTRAST_WORDS)
    text = f"""## Reactivity: do the signals move when something happens?

A signal's movement at a token is its absolute change from the token before, in standard deviations, averaged over
layers and heads. It was compared between events and matched controls. *Surprising tokens* are the tenth of all tokens
that the model expected least; their controls are tokens with less than median surprisal, about as far into the text
and about as frequent. Rare words may move a signal merely for being those words, so the second comparison has
controls of *the very same token*. *Contrast words* ({words}) have controls matched by position, frequency and
surprisal; a comma often stands before them, and is seen one token earlier. The table has the difference at the event
itself (p: that events and controls move alike); the figure shows four tokens before and after."""
    rows = []
    for kind, study in results["reactivity"].items():
        if study:
            for name, found in study["signals"].items():
                ratio = "–" if found["ratio"] is None else f"{found['ratio']:.2f}"
                at = found["at_event"]
                rows.append(
                    [
                        f"{_SHORT.get(kind, _EVENTS[kind])} ({study['events']:,}): {name}",
                        _number(at, "+.3f"),
                        ratio,
                        _p_cell(at),
                    ]
                )
    missing = [_EVENTS[kind] for kind, study in results["reactivity"].items() if not study]
    if not rows:
        return (
            f"{text}\n\nThere was nothing to compare: no signal varies over tokens, or too few events have a control."
        )
    note = f"\n\nToo few events have a control: {'; '.join(missing)}." if missing else ""
    header = ["event (number): signal", "movement beyond the controls'", "as a ratio", "p"]
    found = " ".join(_reaction(kind, study) for kind, study in results["reactivity"].items() if study)
    return f"{text}\n\n{found}\n\n{table(header, rows)}\n![Movement around events](reactivity.png){note}"


def _reaction(kind: str, study: Mapping[str, Any]) -> str:
    """One sentence on what moves at the events of a kind."""
    clear = {name: one for name, one in study["signals"].items() if one["at_event"]["p"] <= _CLEAR and one["ratio"]}
    parts = [
        f"{name} moved {abs(one['ratio'] - 1):.0%}".replace("%", " %") + (" more" if one["ratio"] > 1 else " less")
        for name, one in clear.items()
    ]
    rest = [name for name in study["signals"] if name not in clear]
    if not parts:
        return f"At {_EVENTS[kind]} no signal moved clearly more or less than at the controls."
    quiet = f", and {', '.join(rest)} no differently" if rest else ""
    return f"At {_EVENTS[kind]}, compared with the controls, {', '.join(parts)}{quiet}."


def _homeostasis(results: Mapping[str, Any]) -> str:
    found = results["homeostasis"]
    rows = [
        [
            name,
            f"{one['low']:.2f} to {one['high']:.2f}",
            f"{one['mean']:.3f}",
            f"{one['lowest']:.3f} to {one['highest']:.3f}",
            f"{one['used']:.0%}".replace("%", " %"),
            _percent(one["saturation"], digits=1),
            "–" if one["effective_rank"] is None else f"{_number(one['effective_rank'], '.1f')} of {one['columns']}",
        ]
        for name, one in found["signals"].items()
    ]
    header = ["signal", "range", "mean", "lowest to highest", "range used", "at a bound", "effective rank"]
    text = f"""## Homeostasis and collapse

A healthy signal stays inside its range and still moves. *Range used* is the width of the middle 98 % of its values.
*At a bound* is the share of values within 1 % of the range's ends, where a signal has no gradient left to return (the
open end of a gate does not count). The *effective rank* is the number of independent ways in which the layers and
heads move over tokens: 1 is a single knob for all of them.

{table(header, rows)}"""
    if "effective_rank" in found and len(found["signals"]) > 1 and found["effective_rank"] is not None:
        text += (
            f"\nAll signals together move in {_number(found['effective_rank'], '.1f')} ways, of {found['columns']}.\n"
        )
    text += "\n![Every layer's mean and spread](layers.png)\n"
    if "closed" in found:
        layers = len(next(iter(found["closed"].values())))
        rows = [
            [f"layer {layer}", *(_percent(found["closed"][str(limit)][layer], digits=1) for limit in CLOSED)]
            for layer in range(layers)
        ]
        text += (
            "\nA feed-forward gate near zero makes the layer's feed-forward block needless for that token. The share "
            "of tokens with the gate below a half, a tenth and a hundredth:\n\n"
            + table(["ffn_gate below", *(f"{limit:g}" for limit in CLOSED)], rows)
        )
    return text


def _training(results: Mapping[str, Any]) -> str:
    course = results["training"]
    ends = ", ".join(f"{name} {each['spread'][-1]:.3f}" for name, each in course["signals"].items())
    ranked = {name: each["effective_rank"][-1] for name, each in course["signals"].items() if "effective_rank" in each}
    ends += "; effective rank: " * bool(ranked) + ", ".join(f"{name} {rank:.1f}" for name, rank in ranked.items())
    highest = {name: max(values["saturation"]) for name, values in course["signals"].items()}
    name = max(highest, key=lambda each: highest[each])
    when = course["tokens"][course["signals"][name]["saturation"].index(highest[name])]
    bound = "No signal ever sat at a bound for more than 1 % of its values."
    if highest[name] > 0.01:
        most = f"{100 * highest[name]:.0f} % of its values in one layer, after {when:,} tokens"
        bound = f"The signal {name} came closest to its bounds: {most}."
    return f"""## Over training

From the run's own log. A collapsed controller shows as a spread that falls to zero, an effective rank (the number of
independent ways in which layers and heads move) that falls to one, or a saturation that rises. Spread at the end of
training: {ends}. {bound}

![The signals over training](training.png)"""


def _stereotyping(found: Mapping[str, Any]) -> str:
    text = """## Stereotyping: do a few keywords decide everything?

A controller could sort texts by a few keywords at their beginning and leave it at that."""
    first = found["first_sentence"]
    if first is None:
        text += " (Too few documents have a first sentence and a remainder to ask this, or no signal varies.)"
    else:
        rows = [
            [name, _percent(one["r2"]), _p_cell(one["r2"]), f"{one['between']:.1%}".replace("%", " %")]
            for name, one in first["signals"].items()
        ]
        header = ["signal", "documents' differences predicted", "p", "documents' differences, of all variation"]
        text += f""" The words of the first sentence, in no order, were used to predict the mean signals of the rest
of the same document, on {first["documents"]:,} documents, judged on documents that were not fitted (p: that the first
sentence says nothing, by giving documents each other's first sentences). The last column is the most that such a
prediction could ever explain of the variation over tokens.

{table(header, rows)}"""
    tasks = found["tasks"]
    if not tasks["signals"]:
        return text
    rows = [
        [
            "all signals" if name == "all" else name,
            _number(one["same_words"], ".2f"),
            _number(one["same_frame"], ".2f"),
            _percent(one["words"]) + _p(one["words"]),
            _percent(one["frame"]) + _p(one["frame"]),
        ]
        for name, one in tasks["signals"].items()
    ]
    whole = tasks["signals"].get("all") or next(iter(tasks["signals"].values()))
    ratio = whole["same_words"]["value"] / max(whole["same_frame"]["value"], 1e-9)
    header = ["signal", "same words, other task", "other words, same task", "share of words", "share of task"]
    return f"""{text}

The same keywords in another task: {tasks["keywords"]} sets of three nouns were put into a story, a question, a list
and an order. Each text is a point, its signals' means over its tokens; distances are in standard deviations. A
stereotyping controller would answer to the words and hardly to the task; intervals are over the sets of keywords.
Another task with the same words moves the signals {ratio:.1f} times as far as other words in the same task.

{table(header, rows)}"""


def _examples(results: Mapping[str, Any], scanned: bool) -> str:
    order = results["word_order"]
    text = f"""## Worked example: the same words in another order

“{order["texts"][0]}” and “{order["texts"][1]}” end in the same token, at the same position, after the same words. A
difference between their signals there can only come from the order. It was measured for these two and
{order["pairs"] - 1} more pairs like them. *Rounding* is the difference that comes from reading the very same text in
another batch."""
    if not order["signals"]:
        return f"{text}\n\nNo signal varies over tokens, so nothing is told apart."
    rows = [
        [
            name,
            _number(one["last"], ".4f"),
            f"{one['smallest']:.4f}",
            f"{one['floor']:.1e}",
            "yes" if one["separated"] else "no",
        ]
        for name, one in order["signals"].items()
    ]
    text += "\n\n" + table(
        ["signal", "mean difference at the last token", "smallest pair", "rounding", "all pairs told apart"], rows
    )
    if "tokens" in order:
        text += "\n![Difference of the signals, token by token](word_order.png)\n"
    twist = results["plot_twist"]
    if not scanned:
        return text
    text += f"\n## Worked example: the plot twist\n\n“{twist['text']}”\n\n"
    turns = [
        f"{name} by {one['step']:.2f} standard deviations, more than at {one['rank']:.0%} of all tokens".replace(
            "%", " %"
        )
        + f" (most at “{one['largest'].strip()}”)"
        for name, one in twist["signals"].items()
        if one["step"] is not None
    ]
    if turns:
        text += (
            "At “but” the signals moved: "
            + "; ".join(turns)
            + ". One sentence proves nothing; it shows what the tables above count.\n\n"
        )
    return text + "![Brain scan of the plot twist](plot_twist.png)"


def _name(label: str, results: Mapping[str, Any]) -> str:
    if label != "all":
        return label
    return "all signals" if len(results["signals"]) > 1 else str(results["signals"][0])


def _number(estimate: Mapping[str, Any], form: str = ".4f") -> str:
    """A value and its interval."""
    value, low, high = (_figure(estimate[key], form) for key in ("value", "low", "high"))
    return value if value == "–" else f"{value} [{low}, {high}]"


def _percent(estimate: Mapping[str, Any], digits: int = 0) -> str:
    hundredfold = {key: None if value is None else 100 * value for key, value in estimate.items()}
    value, low, high = (_figure(hundredfold[key], f".{digits}f") for key in ("value", "low", "high"))
    return value if value == "–" else f"{value} % [{low}, {high}]"


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    text = f"{value:{form}}"
    return text.lstrip("-") if not text.strip("-+0.") else text.replace("-", "−")


def _p_cell(estimate: Mapping[str, Any]) -> str:
    return "–" if estimate["p"] is None else f"{estimate['p']:.3f}"


def _p(estimate: Mapping[str, Any]) -> str:
    return "" if estimate["p"] is None else f", p {_p_cell(estimate)}"
