"""Inputs from outside as users write them, by name and for each row of a batch, turned into `ControlInputs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.core.controller.inputs import check_inputs
from ncn.core.types import ControlInputs
from ncn.errors import UserError

SliderValue = float | int | None | Sequence[float | int | None] | Tensor
"""A number from 0 to 1 for all rows; a list or tensor (rows,) for each; or a tensor (rows, places) that moves along the
sequence, the last place going on. None and NaN are unset."""
SliderEnds = float | tuple[float, float]
"""A number from 0 to 1; or a pair, from the first at the beginning of what is written to the second at its end."""
SliderValues = Mapping[str, SliderValue] | Tensor
"""By name; or a tensor (rows, sliders) or (rows, places, sliders) in the order of `controller.sliders`."""
TaskValues = str | int | None | Sequence[str | int | None] | Tensor
"""A name, or its place in `controller.tasks`; a list for each row; or a tensor (rows,) or (rows, places), -1 unset."""
InstructionIds = Sequence[int] | Sequence[Sequence[int] | None] | Tensor
"""Token ids; a list of them for each row, None where unset; or a tensor (rows, tokens), -1 at padding."""

EMPTY_INSTRUCTION = "the instruction is empty: say it in words, or leave it out"


@dataclass(frozen=True)
class InputValues:
    """What is given to a batch of sequences, from their first place on; padding on the left counts as places."""

    sliders: Float[Tensor, "rows places sliders"] | None = None
    tasks: Int[Tensor, "task_rows task_places"] | None = None
    instruction: Int[Tensor, "instruction_rows words"] | None = None

    @classmethod
    def of(
        cls,
        config: NCNConfig,
        sliders: SliderValues | None = None,
        tasks: TaskValues = None,
        instruction: InstructionIds | None = None,
    ) -> InputValues | None:
        """None where nothing is given. Raises `UserError` for what the model does not have, and for wrong values."""
        controller = config.controller
        if isinstance(sliders, Mapping):
            sliders = _by_name(sliders, controller.sliders if controller else ()) if sliders else None
        elif sliders is not None and sliders.ndim == 2:
            sliders = sliders[:, None]
        places = None if tasks is None else _places_of(tasks, controller.tasks if controller else ())
        ids = None if instruction is None else _padded(instruction)
        if sliders is None and places is None and ids is None:
            return None
        check_inputs(ControlInputs(sliders, places, None if ids is None else torch.zeros(1, 1, config.d_model)), config)
        assert controller is not None
        if sliders is not None and not torch.compiler.is_compiling():
            _check_range(sliders, controller.sliders)
        return cls(sliders, places, ids)

    def at(
        self, batch: int, start: int, tokens: int, device: torch.device, pool: Callable[[Tensor], Tensor]
    ) -> ControlInputs:
        """The inputs of the `tokens` places from `start` on, for `batch` sequences.

        A batch that is a multiple of the rows given holds copies of each side by side, as beam search makes them.
        `pool` turns an instruction's ids (rows, words) into pooled embeddings (rows, 1, width).
        """

        def part(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            values = _for_rows(values.to(device), batch)
            if values.shape[1] == 1:
                return values
            return values[:, torch.arange(start, start + tokens, device=device).clamp(max=values.shape[1] - 1)]

        words = None if self.instruction is None else pool(_for_rows(self.instruction.to(device), batch))
        return ControlInputs(part(self.sliders), part(self.tasks), words)


def instruction_ids(
    instruction: str | Sequence[str | None], encode: Callable[[str], list[int]]
) -> list[int] | list[list[int] | None]:
    """The token ids of an instruction in words, or of one for each row. Raises `UserError` for one without words."""
    if isinstance(instruction, str):
        return encode(_worded(instruction))
    return [None if row is None else encode(_worded(row)) for row in instruction]


def _worded(instruction: str) -> str:
    if not instruction.strip():
        raise UserError(EMPTY_INSTRUCTION)
    return instruction.strip()


def both_ends(value: SliderEnds) -> tuple[float, float]:
    """What a slider that may move over a text begins and ends at."""
    return value if isinstance(value, tuple) else (value, value)


def check_ends(values: Mapping[str, SliderEnds], known: Sequence[str]) -> None:
    """Raises `UserError` for a slider that is not `known`, and for a value outside of 0 to 1."""
    for name, value in values.items():
        _check_name(name, known)
        if not all(0 <= end <= 1 for end in both_ends(value)):
            raise UserError(f"slider {name} is {value}; it must lie from 0 to 1")


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"this model has no slider {name!r}; {has}")


def _for_rows(values: Tensor, batch: int) -> Tensor:
    rows = len(values)
    if rows in (1, batch):
        return values
    if batch % rows:
        raise UserError(f"inputs were given for {rows} rows, and the batch has {batch}; give one, or one for each row")
    return values.repeat_interleave(batch // rows, 0)


def _by_name(values: Mapping[str, SliderValue], known: Sequence[str]) -> Tensor:
    for name in values:
        _check_name(name, known)
    columns = [_column(values.get(name)) for name in known]
    rows, places = (max(column.shape[axis] for column in columns) for axis in (0, 1))
    for name, column in zip(known, columns, strict=True):
        if len(column) not in (1, rows) or column.shape[1] not in (1, places):
            raise UserError(f"slider {name} is given for {len(column)} rows, and another one for {rows}")
    return torch.stack([column.expand(rows, places) for column in columns], -1)


def _column(value: SliderValue) -> Tensor:
    """(rows or 1, places or 1)"""
    if isinstance(value, Tensor):
        return value if value.ndim == 2 else value.reshape(-1, 1)
    listed = value if isinstance(value, Sequence) else [value]
    return torch.tensor([[math.nan if number is None else float(number)] for number in listed])


def _check_range(values: Tensor, names: Sequence[str]) -> None:
    outside = (values < 0) | (values > 1)
    if outside.any():
        row, place, slider = outside.nonzero()[0].tolist()
        raise UserError(f"slider {names[slider]} is {values[row, place, slider]:g}; it must lie from 0 to 1")


def _places_of(tasks: TaskValues, known: Sequence[str]) -> Tensor:
    if isinstance(tasks, Tensor):
        return tasks if tasks.ndim == 2 else tasks.reshape(-1, 1)
    listed = tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    return torch.tensor([[_place_of(task, known)] for task in listed])


def _place_of(task: str | int | None, known: Sequence[str]) -> int:
    if task is None:
        return -1
    if isinstance(task, int):
        return task
    if task not in known:
        raise UserError(
            f"this model has no task {task!r}; it has {', '.join(known)}"
            if known
            else f"task {task!r} was given, and this model has none; train one with controller.tasks=[...]"
        )
    return list(known).index(task)


def _padded(ids: InstructionIds) -> Tensor:
    if isinstance(ids, Tensor):
        rows = ids[None] if ids.ndim == 1 else ids
    else:
        lists = [ids] if all(isinstance(token, int) for token in ids) else ids
        given = [None if row is None else [*row] for row in cast("Sequence[Sequence[int] | None]", lists)]
        longest = max((len(row) for row in given if row), default=1)
        if [] in given:
            raise UserError(EMPTY_INSTRUCTION)
        rows = torch.tensor([(row or []) + [-1] * (longest - len(row or [])) for row in given])
    if not rows.numel():
        raise UserError(EMPTY_INSTRUCTION)
    return rows
