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
from ncn.steering.values import SliderEnds, both_ends, check_ends

MIDDLE = 0.5
"""Where a slider rests that is not named."""
_LEAST_SLOPE = 0.1
_NEAR = 0.2
Array = npt.NDArray[np.float64]


class Decoupling:
    """What all sliders of a model are set to, such that each value that is asked for moves one attribute alone.

    With ranks a of the attributes, settings s of the sliders, and the slopes M[j, i] of attribute j over slider i,
    a ≈ a₀ + M (s − ½). What is asked for, t, is turned into settings by the inverse,

        s = ½ + N (t − ½),   N = M⁻¹ D,   D diagonal such that N has ones on its diagonal,

    so that a ≈ a₀ + D (t − ½): each t moves its own attribute, and where one t alone is not ½, its slider is at t.
    Settings end at 0 and 1, where the balance ends as well.

    Attributes:
        names: the sliders, in the model's order.
        mix: N, (sliders, sliders).
        guidance: with which the slopes were measured, and for which alone they hold.

    Raises `UserError` for slopes that cannot be inverted, or under which a slider would hardly move its attribute, or
    move it the wrong way.
    """

    def __init__(self, names: Sequence[str], slopes: Array, guidance: float, before: Array | None = None) -> None:
        """`slopes` is M, (attributes, sliders) in the order of `names`; measured while sliders were set by the mix
        `before`, if any, which is then improved on."""
        try:
            inverse = np.linalg.inv(slopes)
        except np.linalg.LinAlgError:
            raise UserError(
                f"with guidance {guidance:g} two sliders move the same attributes, and cannot be taken apart"
            ) from None
        for name, own, left in zip(names, slopes.diagonal(), 1 / inverse.diagonal(), strict=True):
            if not min(own, left) >= _LEAST_SLOPE:
                raise UserError(
                    f"with guidance {guidance:g} slider {name} hardly moves its own attribute (slope {own:.2f}, and "
                    f"{left:.2f} without what comes through the others); try a stronger guidance, or train it longer"
                )
        mix = inverse if before is None else before @ inverse
        self.names, self.guidance = tuple(names), guidance
        self.mix: Array = mix / mix.diagonal()

    @classmethod
    def read(cls, path: str | Path, guidance: float = 1.0) -> Decoupling:
        """From the `steer.json` of `ncn steer MODEL --others 0.5 --guidance …`.

        M holds the slopes from end to end, as a slider may go, and on its diagonal those around the middle, where an
        attribute follows its own slider most steeply: a slider that makes good what another one does moves a little.

        Raises `UserError` for another file, several models, or another guidance.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            models, others, known = list(found["models"].values()), found["others"], found["guidances"]
            sliders = models[0]["sliders"]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give the steer.json of `ncn steer`") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is no steer.json of `ncn steer`") from None
        if len(models) > 1:
            raise UserError(f"{path} holds {len(models)} models: measure the one that is meant alone")
        if others != MIDDLE:
            raise UserError(f"{path} was not measured with the others in the middle: measure it with --others 0.5")
        key = f"{guidance:g}"
        if key not in known:
            raise UserError(
                f"{path} was measured with guidance {', '.join(known)}, not {key}: give --guidance {known[0]}"
            )
        settings = np.array(found["settings"])
        means = np.array([[sliders[slider][key]["means"][attribute] for slider in sliders] for attribute in sliders])
        slopes = _slopes(settings, means, MIDDLE)
        np.fill_diagonal(slopes, _slopes(settings, means, _NEAR).diagonal())
        mixes = found.get("mixes")
        return cls(list(sliders), slopes, guidance, None if mixes is None else np.array(mixes[key]))

    def check_sliders(self, names: Sequence[str]) -> None:
        """Raises `UserError` where a model has other sliders than were measured."""
        if self.names != tuple(names):
            raise UserError(
                f"the sliders {', '.join(self.names)} were measured, and this model has {', '.join(names) or 'none'}"
            )

    def settings(self, wanted: Array) -> Array:
        """The settings for `wanted`; both are (…, sliders)."""
        return np.clip(MIDDLE + (wanted - MIDDLE) @ self.mix.T, 0, 1)

    def __call__(self, wanted: Mapping[str, SliderEnds]) -> dict[str, SliderEnds]:
        """Settings for all sliders, by name, for what each of them is asked for, ½ where it is not named. A pair of
        numbers moves from the first to the second, for `ncn.generate` alone."""
        check_ends(wanted, self.names)
        ends = np.array([both_ends(wanted.get(name, MIDDLE)) for name in self.names])
        first, last = (self.settings(column).tolist() for column in ends.T)
        moves = any(isinstance(value, tuple) for value in wanted.values())
        return {name: (one, other) if moves else one for name, one, other in zip(self.names, first, last, strict=True)}


def _slopes(settings: Array, means: Array, near: float) -> Array:
    """The slopes (...) of `means` (..., settings), by least squares over the settings no further than `near` from the
    middle, on both sides of which they lie alike."""
    kept = np.abs(settings - MIDDLE) <= near
    centred = settings[kept] - MIDDLE
    slopes: Array = means[..., kept] @ centred / (centred @ centred)
    return slopes
