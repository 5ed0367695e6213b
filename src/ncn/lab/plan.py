"""The plan of an experiment, which its folder keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncn.errors import UserError
from ncn.machine.files import flat
from ncn.training.run_folder import FREE_SETTINGS


def check_same_plan(before: Mapping[str, Any], after: Mapping[str, Any], out: Path) -> None:
    advice = "give the same command as before, or name another folder for a new experiment"
    arms = [", ".join(facts["arms"]) for facts in (before, after)]
    if arms[0] != arms[1]:
        raise UserError(f"the experiment in {out} has the arms {arms[0]}, and now they are {arms[1]}; {advice}")
    old, new = flat(before), flat(after)
    for name, value in new.items():
        if not name.endswith(FREE_SETTINGS) and old.get(name) != value:
            raise UserError(
                f"the experiment in {out} was begun with {name} = {old.get(name)!r}, and now it is {value!r}; {advice}"
            )
