"""The measurement: stories of every model at every value of every slider, kept one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save

from ncn.core.interface import LanguageModel
from ncn.core.model import ModulatedTransformer
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.experiments.steering.losses import window_losses
from ncn.experiments.steering.obedience import SETTINGS, distinct
from ncn.experiments.steering.plan import DISTINCT, DISTINCT_TOKENS, PROMPT_TOKENS, Arrays, Judge, Plan
from ncn.experiments.steering.results import summarise
from ncn.inference.decoding import Request, write
from ncn.inference.evaluate import bits_per_byte
from ncn.inference.sampling import Sampling
from ncn.machine.files import write_atomically, write_json
from ncn.machine.progress import ProgressReport
from ncn.steering.attributes import DocumentSliders, measure, rank
from ncn.steering.decoupling import MIDDLE, Decoupling


@dataclass(frozen=True)
class Steering:
    """What was measured.

    Attributes:
        results: what `steer.json` holds.
    """

    results: dict[str, Any]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `steer.json`, two figures, and the page (Markdown and HTML); returns their paths."""
        from ncn.experiments.steering.page import write_steering

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "steer.json", self.results)
        return [folder / "steer.json", *write_steering(self.results, folder)]


def steer(
    models: Mapping[str, LanguageModel],
    tokenizer: Tokenizer,
    data: TokenDataset,
    folder: str | Path,
    *,
    without: Mapping[str, LanguageModel] | None = None,
    judge: Judge | None = None,
    prompts: int = 200,
    seeds: int = 3,
    guidances: Sequence[float] = (1.0,),
    temperature: float = 0.8,
    others: float | None = None,
    decouple: str | Path | None = None,
    batch_size: int = 300,
    loss_tokens: int = 250_000,
    progress: bool = False,
) -> Steering:
    """Write stories with every slider at seven values, and measure them.

    What is measured for one slider of one model with one seed is kept in `folder`/measured, and not measured again.

    Args:
        models: with the same tokenizer and sliders, by name; the others are compared with the first.
        data: held-out documents with attributes: their first tokens are the prompts, and the loss is measured on them.
        without: models without sliders: what it costs to have them and to leave them unset is measured against these.
        judge: an independent model, whose bits per byte say how fluent the stories are.
        prompts: how many documents to begin.
        seeds: stories written for each prompt and value.
        guidances: each makes stories of its own.
        temperature: of sampling; all tokens may be drawn.
        others: what the other sliders are set to; by default they are unset.
        decouple: the `steer.json` of an earlier measurement of the one model: the others are then moved with a slider
            such that their own attributes stay where they are (`ncn.steering.decoupling`).
        batch_size: stories written at once.
        loss_tokens: held-out tokens for the losses.

    Raises:
        UserError: a model has no sliders, or others than the first, or another vocabulary; or the data has no
            attributes or too few documents; or `decouple` is of other sliders, lies in `folder`, or comes
            with `others` or several models.
    """
    names = _common_sliders(models)
    DocumentSliders(data, names)  # refuses data that does not have them
    if not all(guidance > 0 for guidance in guidances):
        raise UserError("a guidance must be above 0; 1 is the model as it is")
    if others is not None and not 0 <= others <= 1:
        raise UserError(f"the other sliders cannot be set to {others}: a slider lies from 0 to 1")
    mixes = None if decouple is None else _decouplings(decouple, guidances, names, Path(folder))
    if mixes and len(models) > 1:
        raise UserError("--decouple is of one model: measure it without --against")
    if mixes and others is not None:
        raise UserError("--decouple sets the other sliders itself: leave out --others")
    longest = min(model.core_config.context_length for model in models.values())
    plan = Plan(
        data, tokenizer, names, prompts, seeds, temperature, judge, Path(folder) / "measured", batch_size, loss_tokens,
        longest, others if mixes is None else MIDDLE, mixes,
    )  # fmt: skip
    plain = dict(without or {})
    _check_vocabularies({**models, **plain}, tokenizer)
    plan.folder.mkdir(parents=True, exist_ok=True)
    losses = {label: _losses(plan, label, model, names) for label, model in models.items()}
    losses |= {label: _losses(plan, label, model, ()) for label, model in plain.items()}
    units = list(itertools.product(range(seeds), models, range(len(names)), guidances))
    answers: dict[tuple[str, int, float], list[Arrays]] = {}
    with ProgressReport("write", len(units) * plan.stories, progress) as bar:
        tokens = 0
        for done, (seed, label, index, guidance) in enumerate(units):
            path = plan.folder / f"{label}.{names[index]}.{guidance:g}.{seed}.safetensors"
            mixed = {} if mixes is None else {"mix": mixes[guidance].mix.tolist()}
            identity = plan.identity(models[label], slider=names[index], guidance=guidance, seed=seed, **mixed)
            kept = _kept(path, identity)
            if kept is None:
                parts = _Answer(plan, models[label], index, guidance, seed)
                for written, size in parts:
                    tokens += size
                    bar.update(done * plan.stories + written, tokens)
                kept = parts.result
                write_atomically(path, save(kept, metadata={"identity": identity}))
            answers.setdefault((label, index, guidance), []).append(kept)
            bar.update((done + 1) * plan.stories, tokens)
    return Steering(summarise(plan, models, plain, losses, answers, guidances))


def _decouplings(
    path: str | Path, guidances: Sequence[float], names: tuple[str, ...], folder: Path
) -> dict[float, Decoupling]:
    if Path(path).resolve() == (folder / "steer.json").resolve():
        raise UserError(f"{path} would be written over: give --out another folder")
    found = {guidance: Decoupling.read(path, guidance) for guidance in guidances}
    for decoupling in found.values():
        decoupling.check_sliders(names)
    return found


class _Answer:
    """Stories of one slider of one model with one seed: iterating writes and measures them, and gives how many stories
    there are so far and how many tokens were written since; `result` is then what is kept."""

    def __init__(self, plan: Plan, model: LanguageModel, index: int, guidance: float, seed: int) -> None:
        self.plan, self.model, self.index, self.guidance, self.seed = plan, model, index, guidance, seed
        self.result: Arrays = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        plan, room = self.plan, self.plan.longest - PROMPT_TOKENS - 1
        twin = one_document_a_row(self.model)
        settings = torch.arange(len(SETTINGS)).repeat_interleave(plan.prompts)
        prompts = torch.arange(plan.prompts).repeat(len(SETTINGS))
        sliders = torch.full((plan.stories, 1, len(plan.sliders)), math.nan if plan.others is None else plan.others)
        sliders[:, 0, self.index] = torch.tensor(SETTINGS)[settings]
        if plan.decoupled is not None:
            sliders = torch.from_numpy(plan.decoupled[self.guidance].settings(sliders.double().numpy())).float()
        beginnings = plan.beginnings
        stories: list[list[int]] = []
        requests = [
            Request(
                beginnings[prompt], room, Sampling(plan.temperature, seed=self.seed, choice=prompt),
                plan.tokenizer.separator_id, _by_name(plan.sliders, values), guidance=self.guidance,
            )
            for prompt, values in zip(prompts.tolist(), sliders[:, 0].tolist(), strict=True)
        ]  # fmt: skip
        for first in range(0, plan.stories, plan.batch_size):
            part = requests[first : first + plan.batch_size]
            written = dict(write(twin, part, len(part)))
            stories += [[*part[number].prompt[1:], *written[number].tokens] for number in range(len(part))]
            yield len(stories), sum(map(len, stories[first:]))
        self.result = _measured(plan, stories, judged=self.seed == 0)


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float | tuple[float, float]]:
    """The sliders that are set."""
    return {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}


def one_document_a_row(model: LanguageModel) -> LanguageModel:
    """The same model, for rows that hold one document each: what keeps documents apart is then only a cost."""
    if model.core_config.cross_documents or not isinstance(model, ModulatedTransformer):
        return model
    twin = ModulatedTransformer(model.config.override(cross_documents=True))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.device).eval().requires_grad_(False)


def _measured(plan: Plan, stories: list[list[int]], *, judged: bool) -> Arrays:
    """Of stories in order of (settings, prompts): their ranks (attributes, settings, prompts), and at every setting the
    share that the context cut off, the share of different runs of tokens, and bits per byte under the judge."""
    shape = (len(SETTINGS), plan.prompts)
    texts = [plan.tokenizer.decode(ids) for ids in stories]
    measured = [measure(text, np.array(ids), plan.counts) for text, ids in zip(texts, stories, strict=True)]
    ranks = np.stack(
        [
            rank(np.array([story[name] for story in measured]), quantiles).reshape(shape)
            for name, quantiles in plan.quantiles.items()
        ]
    )
    starts = range(0, len(stories), plan.prompts)
    by_setting = [stories[start : start + plan.prompts] for start in starts]
    size = min(DISTINCT_TOKENS, *(sum(map(len, part)) for part in by_setting))
    result = {
        "ranks": ranks.astype(np.float32),
        "cut": np.array([len(ids) == plan.longest - 1 for ids in stories]).reshape(shape).mean(1),
        "distinct": np.array([[distinct(part, run, size) for part in by_setting] for run in DISTINCT]),
    }
    if plan.judge is not None and judged:
        judge = plan.judge
        result["bits_per_byte"] = np.array([bits_per_byte(*judge, texts[s : s + plan.prompts]) for s in starts])
    return result


def _losses(plan: Plan, label: str, model: LanguageModel, names: tuple[str, ...]) -> Arrays:
    path, identity = plan.folder / f"{label}.loss.safetensors", plan.identity(model, sliders=list(names))
    kept = _kept(path, identity)
    if kept is None:
        known = DocumentSliders(plan.data, names) if names else None
        kept = window_losses(model, plan.data, known, plan.loss_tokens)
        write_atomically(path, save(kept, metadata={"identity": identity}))
    return kept


def _kept(path: Path, identity: str) -> Arrays | None:
    """What was measured before, if it is what would be measured now."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("identity")
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); remove it") from None
    return load_file(path) if found == identity else None


def _common_sliders(models: Mapping[str, LanguageModel]) -> tuple[str, ...]:
    names: tuple[str, ...] = ()
    for label, model in models.items():
        own = model.core_config.controller.sliders if model.core_config.controller else ()
        if not own:
            raise UserError(f"{label} has no sliders: train one with controller.sliders=[...]")
        if names and own != names:
            raise UserError(f"{label} has the sliders {', '.join(own)}, and the others have {', '.join(names)}")
        names = own
    return names


def _check_vocabularies(models: Mapping[str, LanguageModel], tokenizer: Tokenizer) -> None:
    for label, model in models.items():
        if model.core_config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{label} has a vocabulary of {model.core_config.vocab_size}, and the tokenizer one of "
                f"{tokenizer.vocab_size}: compare models of one tokenizer"
            )
