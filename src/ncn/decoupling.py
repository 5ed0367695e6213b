"""Sliders that are set together such that each moves its own attribute alone.

Guidance makes sliders obeyed, and makes them move what they are not named after too: more dialogue with fewer
exclamations, say. `ncn steer` measures how much each attribute moves with each slider. What one slider does to the
others' attributes is then made good by moving the others with it, as a control engineer decouples the inputs of a plant
that mixes them (static decoupling by the inverse of the gain at rest).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ncn.errors import UserError

MIDDLE = 0.5
"""Where a slider rests that is not named: its attribute is to be as in the middle document."""
_LEAST_SLOPE = 0.1
_NEAR = 0.2
Array = npt.NDArray[np.float64]
Ends = float | tuple[float, float]


class Decoupling:
    """What all sliders of a model are set to, for attributes that are wanted.

    With ranks a of the attributes, settings s of the sliders, and the slopes M[j, i] of attribute j over slider i,
    a ≈ a₀ + M (s − ½) where no slider is far from the middle. It is inverted,

        s = ½ + N (t − ½),   N = M⁻¹ D,   D diagonal such that N has ones on its diagonal,

    so that M N is diagonal: of the wanted t, each moves one attribute, and its own slider by just as much. Settings end
    at 0 and 1, where the balance ends as well.

    Attributes:
        names: the sliders, in the model's order.
        mix: N, (sliders, sliders).
        guidance: with which the slopes were measured, and for which alone they hold.
    """

    def __init__(self, names: Sequence[str], slopes: Array, guidance: float, before: Array | None = None) -> None:
        """`slopes` is M, (attributes, sliders) in the order of `names`; measured while sliders were set by the mix
        `before`, if any, which is then improved on. Raises `UserError` for a slider that does not move its own
        attribute."""
        for name, slope in zip(names, slopes.diagonal(), strict=True):
            if not slope >= _LEAST_SLOPE:
                raise UserError(
                    f"slider {name} hardly moves its own attribute (slope {slope:.2f} with guidance {guidance:g}), so "
                    "the others cannot be made good with it; try a stronger guidance, or train it longer"
                )
        mix = np.linalg.inv(slopes) if before is None else before @ np.linalg.inv(slopes)
        self.names, self.guidance = tuple(names), guidance
        self.mix: Array = mix / mix.diagonal()

    @classmethod
    def read(cls, path: str | Path, guidance: float = 1.0) -> Decoupling:
        """From the `steer.json` of `ncn steer MODEL --others 0.5 --guidance …`, of its first model.

        Raises `UserError` for another file, another guidance, or sliders whose attributes were not measured.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            sliders, others, before = next(iter(found["models"].values()))["sliders"], found["others"], found["mixes"]
            known = found["guidances"]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give the steer.json of `ncn steer`") from None
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise UserError(
                f"{path} is no steer.json of this version of `ncn steer`: measure the model again"
            ) from None
        if others != MIDDLE:
            raise UserError(f"{path} was not measured with the others in the middle: measure it with --others 0.5")
        key = f"{guidance:g}"
        if key not in known:
            raise UserError(
                f"{path} was measured with guidance {', '.join(known)}, not {key}: give --guidance {known[0]}"
            )
        settings = np.array(found["settings"])
        means = np.array([[sliders[slider][key]["means"][attribute] for slider in sliders] for attribute in sliders])
        # A slider that makes good moves a little around the middle, where its own attribute follows it most steeply;
        # one that is made good for may go from end to end.
        slopes = _slopes(settings, means)
        np.fill_diagonal(slopes, _slopes(settings, means, _NEAR).diagonal())
        return cls(list(sliders), slopes, guidance, None if before is None else np.array(before[key]))

    def settings(self, wanted: Array) -> Array:
        """(…, sliders), both."""
        return np.clip(MIDDLE + (wanted - MIDDLE) @ self.mix.T, 0, 1)

    def __call__(self, wanted: Mapping[str, Ends]) -> dict[str, Ends]:
        """Settings for all sliders, by name, for wanted ranks of attributes; those that are not named are to stay in
        the middle. A pair of numbers moves from the first to the second, as in `ncn.generate`."""
        for name, value in wanted.items():
            if name not in self.names:
                raise UserError(f"no slider {name!r} was measured; {', '.join(self.names)} were")
            if not all(0 <= end <= 1 for end in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"slider {name} is {value}; it must lie from 0 to 1")
        given = [wanted.get(name, MIDDLE) for name in self.names]
        ends = np.array([end if isinstance(end, tuple) else (end, end) for end in given])
        first, last = (self.settings(column).tolist() for column in ends.T)
        moves = any(isinstance(end, tuple) for end in given)
        return {name: (one, other) if moves else one for name, one, other in zip(self.names, first, last, strict=True)}


def _slopes(settings: Array, means: Array, near: float = MIDDLE) -> Array:
    """The slopes (...) of `means` (..., settings), by least squares over the settings as `near` to the middle."""
    kept = np.abs(settings - MIDDLE) <= near
    centred = settings[kept] - MIDDLE
    slopes: Array = means[..., kept] @ centred / (centred @ centred)
    return slopes
