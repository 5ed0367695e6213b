"""Decoding: texts are continued together, one token each at a time, in a batch that they join and leave.

Every row has a prompt, a way of sampling, and inputs of the controller of its own, and writes what it writes alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ncn.core.cache import Cache
from ncn.core.interface import LanguageModel, ModelOutput
from ncn.core.signals.table import Frozen, signal_shape
from ncn.core.types import ControlInputs, Instructions
from ncn.errors import UserError
from ncn.inference.sampling import Sampler, Sampling
from ncn.machine.compiling import compiled
from ncn.steering.values import EMPTY_INSTRUCTION, SliderEnds, both_ends, check_ends

_FEWER = 0.75
"""Rows that have ended leave the cache when no more than this share of it still writes: leaving copies the cache."""


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most new tokens.
        sampling: how they are chosen.
        stop_id: the token that ends the text, and is no part of it.
        sliders: inputs of the controller by name, each a number from 0 to 1, or a pair of numbers: from the first at
            the prompt to the second at `max_tokens`. Those that are not named are unset.
        task: one of the model's tasks.
        instruction: token ids of an instruction.
        guidance: above 1, extrapolate from the model without sliders, task and instruction to the model with them:
            logits are unset + guidance · (set − unset).
        frozen: signals by name held at values (layers[, sites]), or at one for all; NaN leaves a value free.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_id: int | None = None
    sliders: Mapping[str, SliderEnds] = field(default_factory=dict)
    task: str | None = None
    instruction: Sequence[int] | None = None
    guidance: float = 1.0
    frozen: Frozen = field(default_factory=dict)


class Row:
    """A text that is being written.

    Attributes:
        tokens: those written so far.
        ended: None while it goes on; then "stop", at its `stop_id`, or "length", at `max_tokens` or a full context.
    """

    def __init__(self, request: Request, model: LanguageModel) -> None:
        """Raises `UserError` for a request that the model cannot serve."""
        self.request = request
        self.tokens: list[int] = []
        self.ended: Literal["stop", "length"] | None = None
        config, controller = model.core_config, model.core_config.controller
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if not request.prompt:
            raise UserError("the prompt is empty: give at least one token")
        self.room = min(request.max_tokens, config.context_length - len(request.prompt))
        if self.room <= 0:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens (with the separator in front) and the model's context is "
                f"{config.context_length}; shorten it"
            )
        known, tasks = (controller.sliders, controller.tasks) if controller else ((), ())
        check_ends(request.sliders, known)
        if request.task is not None and request.task not in tasks:
            raise UserError(f"this model has no task {request.task!r}; it has {', '.join(tasks) or 'none'}")
        if request.guidance < 0:
            raise UserError(f"guidance must be 0 or more, not {request.guidance}")
        if request.instruction is not None and not request.instruction:
            raise UserError(EMPTY_INSTRUCTION)
        given = request.sliders or request.task is not None or request.instruction is not None
        if request.guidance != 1 and not given:
            raise UserError("guidance leads towards sliders, a task or an instruction, and none is set")
        self.ends = [both_ends(request.sliders.get(name, math.nan)) for name in known] if request.sliders else []
        self.task = -1 if request.task is None else tasks.index(request.task)
        self.instruction: Tensor | None = None  # (width,)
        if request.instruction is not None:
            said = Instructions(torch.tensor([[*request.instruction]]), torch.zeros(1, 1, dtype=torch.long))
            pooled = model.pooled(ControlInputs(instruction=said).to(model.device))
            assert pooled is not None
            assert isinstance(pooled.instruction, Tensor)
            self.instruction = pooled.instruction[0, 0]

    @property
    def guided(self) -> bool:
        """Whether it is read a second time, with nothing set."""
        return self.request.guidance != 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and those written."""
        return len(self.request.prompt) + len(self.tokens)

    def sliders(self) -> list[float]:
        """Those of the next token; empty where none is set."""
        share = min(len(self.tokens) / max(self.request.max_tokens - 1, 1), 1)
        return [first + share * (last - first) for first, last in self.ends]

    def take(self, token: int) -> None:
        """Write the next token, or end."""
        if token == self.request.stop_id:
            self.ended = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.room:
            self.ended = "length"


class _Batch:
    """Rows that are read together, and their cache; a guided row is two of the cache's, unset and set."""

    def __init__(self, rows: list[Row], cache: Cache, model: LanguageModel) -> None:
        self.cache, self._model = cache, model
        self._use(rows)

    def _use(self, rows: list[Row]) -> None:
        """Work out whatever stays the same from token to token."""
        self.rows, device = rows, self._model.device
        self.read = [(row, isset) for row in rows for isset in ((False, True) if row.guided else (True,))]
        """What each row of the cache is: a text, and whether it is read with what is set."""
        self._moves = any(first != last for row in rows for first, last in row.ends if not math.isnan(first))
        self._inputs = ControlInputs(self._sliders(), self._tasks(), self._instructions()).to(device)
        self._frozen = self._held()
        self._isset: Tensor | None = None
        if any(row.guided for row in rows):
            self._isset = torch.tensor([place for place, (_, isset) in enumerate(self.read) if isset], device=device)
            self._unset = self._isset - torch.tensor([row.guided for row in rows], device=device).long()
            self._guidance = torch.tensor([row.request.guidance for row in rows], device=device)[:, None]

    def options(self) -> dict[str, Any]:
        """What the model is told beside the tokens: inputs from outside, and signals held still, as far as any are."""
        inputs = self._inputs
        if self._moves:
            sliders = self._sliders()
            inputs = inputs._replace(sliders=None if sliders is None else sliders.to(self._model.device))
        return {"control": inputs} | ({"frozen": self._frozen} if self._frozen else {})

    def guided(self, logits: Float[Tensor, "read vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """The logits to choose from, of those of all rows of the cache."""
        if self._isset is None:
            return logits
        unset = logits[self._unset]
        return unset + self._guidance * (logits[self._isset] - unset)

    def keep(self, wanted: Sequence[Row]) -> None:
        """Let all other rows leave, and forget the padding that no row is left to need."""
        self.cache.reorder(torch.tensor([place for place, (row, _) in enumerate(self.read) if row in wanted]))
        self._use([row for row in self.rows if row in wanted])
        if padding := self.cache.length - max(row.length - 1 for row in self.rows):
            self.cache.forget_first(padding)

    def _sliders(self) -> Tensor | None:
        """(rows, 1, sliders), NaN where unset."""
        if not any(row.ends for row in self.rows):
            return None
        unset = [math.nan] * max(len(row.ends) for row in self.rows)
        return torch.tensor([[row.sliders() if isset and row.ends else unset] for row, isset in self.read])

    def _tasks(self) -> Tensor | None:
        """(rows, 1), -1 where unset."""
        if all(row.task < 0 for row in self.rows):
            return None
        return torch.tensor([[row.task if isset else -1] for row, isset in self.read])

    def _instructions(self) -> Tensor | None:
        """(rows, 1, width), 0 where unset."""
        said = [row.instruction for row in self.rows if row.instruction is not None]
        if not said:
            return None
        nothing = torch.zeros_like(said[0])
        rows = [row.instruction if isset and row.instruction is not None else nothing for row, isset in self.read]
        return torch.stack(rows)[:, None]

    def _held(self) -> Frozen:
        """Signals held still, (rows, 1, layers[, sites]) by name, NaN where they are not."""
        config, found = self._model.core_config, {}
        for name in {name for row in self.rows for name in row.request.frozen}:
            shape = (config.num_layers, *signal_shape(name, config))
            values = [
                row.request.frozen.get(name, torch.tensor(math.nan)).float().expand(shape) for row, _ in self.read
            ]
            found[name] = torch.stack(values)[:, None].to(self._model.device)
        return found


class Decoder:
    """Continues texts together. Rows `join` at any time, `step` writes a token of each, and they `leave` by ending.

    What a row writes does not depend on the others: logits differ by the rounding of a batch's matrix products, about
    1e-5, and the numbers that tokens are drawn with not at all.
    """

    def __init__(self, model: LanguageModel, *, compile: bool = False, joins: bool = True) -> None:
        """
        Args:
            compile: compile the step of one token; see `generate_tokens`.
            joins: whether rows may join after others have; without, a base's cache may be smaller.
        """
        if compile and not model.compiles:
            raise UserError("a controller on a base writes as it is; leave out compile")
        self.model, self.joins = model, joins
        self._compiled = compiled(model.read, dynamic=True) if compile else None
        controller = model.core_config.controller
        # one compiled step serves all: for a single token after more than the controller's convolution reaches back to
        self._shortest = max(2, controller.phasic_kernel if controller else 0)
        self._batch: _Batch | None = None
        self._fresh: list[tuple[_Batch, Float[Tensor, "rows vocabulary"]]] = []
        """Rows that have joined since the last step, with the logits of their first token."""
        self._sampled: list[Row] = []
        self._sampler = Sampler([], model.device)

    @property
    def rows(self) -> list[Row]:
        """The texts that are being written."""
        batches = [*([self._batch] if self._batch else []), *(batch for batch, _ in self._fresh)]
        return [row for batch in batches for row in batch.rows if row.ended is None]

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> list[Row]:
        """Read the prompts of more texts, all at once; raises `UserError` for a request that cannot be served."""
        if self._batch and not self.joins:
            raise ValueError("this decoder was made for rows that begin together")
        rows = [Row(request, self.model) for request in requests]
        longest, device = max(row.length for row in rows), self.model.device
        most = max(row.length + row.room for row in rows)
        capacity = self.model.core_config.context_length if self._compiled else most
        batch = _Batch([*rows], self.model.new_cache(capacity, joins=self.joins), self.model)
        prompts = [row.request.prompt for row, _ in batch.read]
        tokens = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=device)
        mask = None
        if min(map(len, prompts)) < longest:
            first = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
            mask = torch.arange(longest, device=device) >= first
        self._fresh.append((batch, self._read(batch, tokens, mask)))
        return rows

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token for every text that is being written; gives those texts, of which some have ended with it."""
        parts = self._fresh
        if self._batch:
            tokens = [[row.tokens[-1] if row.tokens else 0] for row, _ in self._batch.read]  # 0: it ended at once
            logits = self._read(self._batch, torch.tensor(tokens, device=self.model.device), None)
            parts = [(self._batch, logits), *parts]
        if not parts:
            return []
        rows = [row for batch, _ in parts for row in batch.rows]
        logits = torch.cat([logits for _, logits in parts]) if len(parts) > 1 else parts[0][1]
        if rows != self._sampled:
            self._sampled, samplings = rows, [row.request.sampling for row in rows]
            self._sampler = Sampler(samplings, self.model.device)
        chosen = self._sampler(logits, [row.length for row in rows]).tolist()
        written = [(row, token) for row, token in zip(rows, chosen, strict=True) if row.ended is None]
        for row, token in written:
            row.take(token)
        if self._fresh:
            self._merge()
        self._tidy()
        return [row for row, _ in written]

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Stop writing a text."""
        row.ended = row.ended or "length"
        self._tidy()

    def _read(self, batch: _Batch, tokens: Tensor, mask: Tensor | None) -> Float[Tensor, "rows vocabulary"]:
        """Logits of every row's next token, guided."""
        step = self._compiled
        if step is None or mask is not None or tokens.shape[1] > 1 or batch.cache.length < self._shortest:
            step = self.model.read
        output: ModelOutput = step(tokens, mask, cache=batch.cache, last_only=True, **batch.options())
        return batch.guided(output.logits[:, -1])

    def _merge(self) -> None:
        """Put the rows that have joined into the batch, now that every one has a token to be read."""
        batches = [*([self._batch] if self._batch else []), *(batch for batch, _ in self._fresh)]
        self._fresh = []
        if len(batches) > 1:
            for batch in batches:
                living = [row for row in batch.rows if row.ended is None]
                if 0 < len(living) < len(batch.rows):
                    batch.keep(living)
            batches = [batch for batch in batches if any(row.ended is None for row in batch.rows)]
        if len(batches) > 1:
            cache = type(batches[0].cache).joined([batch.cache for batch in batches])
            batches = [_Batch([row for batch in batches for row in batch.rows], cache, self.model)]
        self._batch = batches[0] if batches else None

    def _tidy(self) -> None:
        """Take rows that have ended out of the batch, when enough of them have, or there is no room for a slot."""
        batch = self._batch
        if batch is None:
            return
        living = [row for row in batch.rows if row.ended is None]
        if not living:
            self._batch = None
        elif len(living) <= _FEWER * len(batch.rows) or batch.cache.length >= self.model.core_config.context_length:
            batch.keep(living)


def write(model: LanguageModel, requests: Sequence[Request], rows: int) -> Iterator[tuple[int, Row]]:
    """Continue many texts, `rows` at once at most; gives the number of a request and its text, as they end.

    Others join as texts end, a quarter of the rows at a time: reading prompts together is cheaper.
    """
    decoder = Decoder(model, joins=len(requests) > rows)
    waiting, numbers = list(enumerate(requests)), dict[int, int]()
    while waiting or decoder.rows:
        free = rows - len(decoder.rows)
        if waiting and free >= min(len(waiting), (1 - _FEWER) * rows):
            joining, waiting = waiting[:free], waiting[free:]
            joined = decoder.join([request for _, request in joining])
            numbers |= {id(row): number for row, (number, _) in zip(joined, joining, strict=True)}
        for row in decoder.step():
            if row.ended is not None:
                yield numbers[id(row)], row


def generate_tokens(
    model: LanguageModel,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_id: int | None = None,
    sliders: Mapping[str, SliderEnds] | None = None,
    task: str | None = None,
    instruction: Sequence[int] | None = None,
    guidance: float = 1.0,
    frozen: Frozen | None = None,
    compile: bool = False,
) -> Iterator[int]:
    """Yield new token ids as they come; ends at `stop_id` (not yielded), after `max_tokens`, or at a full context.

    The arguments are those of `Request` and `Sampling`: the same `seed` gives the same tokens.

    `compile` compiles the step of one token, which takes up to a minute at the first text that a process writes with
    the model, and with each other kind of inputs from outside. From then on a step takes a third to two thirds of the
    time, because most of what it does is too little work for an operation of its own. Numbers may differ in their last
    bits from those of the step as it is. torch compiles eight kinds of step in one process; others run as they are.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    request = Request(
        prompt, max_tokens, sampling, stop_id, sliders or {}, task, instruction, guidance, frozen or {}
    )  # fmt: skip
    decoder = Decoder(model, compile=compile, joins=False)
    (row,) = decoder.join([request])
    for number in itertools.count():
        decoder.step()
        if len(row.tokens) > number:
            yield row.tokens[number]
        if row.ended is not None:
            return
