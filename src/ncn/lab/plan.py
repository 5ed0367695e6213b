"""Beginning an experiment, and going on with it: its folder keeps the plan, and only the same plan goes on there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ncn.config.training import TrainConfig
from ncn.errors import UserError
from ncn.machine.devices import arithmetic, find_device
from ncn.machine.environment import command_words, describe_environment
from ncn.machine.files import flat, read_json, write_json
from ncn.training.run_folder import FREE_SETTINGS

_MAY_DIFFER = (*FREE_SETTINGS, ".seconds_per_step")
"""Ends of names in a plan: settings that do not change a result, and what was measured beside the plan."""


def begin_experiment(
    path: Path, facts: Mapping[str, Any], train: TrainConfig, measure: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the plan of an experiment, or check that it is the one that the experiment there was begun with.

    Args:
        path: the JSON file of the plan, in the experiment's folder.
        facts: what must not change while the experiment goes on.
        train: says where and in which precision the runs are computed, for the description of the environment.
        measure: gives what else the file holds, such as times; an entry that `facts` have too is replaced. Asked only
            where the experiment begins.

    Returns:
        What the file holds: command, environment, facts and what was measured.

    Raises:
        UserError: the file is there with other facts; names the first that differs.
    """
    if path.is_file():
        before = read_json(path)
        _check_same(before, facts, path.parent)
        return before
    device = find_device(train.device)
    environment = describe_environment(device, autocast=str(arithmetic(train.precision, device)))
    write_json(path, {"command": shlex.join(command_words()), "environment": environment, **facts, **measure()})
    return read_json(path)


def _check_same(before: Mapping[str, Any], facts: Mapping[str, Any], out: Path) -> None:
    advice = "give the same command as before, or name another folder for a new experiment"
    for name, table in facts.items():
        if isinstance(table, Mapping) and all(isinstance(row, Mapping) for row in table.values()):
            had, has = ", ".join(before.get(name, ())), ", ".join(table)
            if had != has:
                raise UserError(f"the experiment in {out} has the {name} {had}, and now they are {has}; {advice}")
    # what the file alone has at its top was measured
    old, new = flat({name: before[name] for name in facts if name in before}), flat(facts)
    for name in new | old:
        if not name.endswith(_MAY_DIFFER) and old.get(name) != new.get(name):
            raise UserError(
                f"the experiment in {out} was begun with {name} = {old.get(name)!r}, and now it is {new.get(name)!r}; "
                f"{advice}"
            )
