"""A process that trains runs for `ncn.lab.fleet`: jobs come in on standard input, a line of JSON each, and what becomes
of them goes out on standard output.

It ends when its input does, which is also what happens when the process that feeds it dies. A run that is being
trained then is saved first.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.machine.files import write_json
from ncn.machine.stopping import Interrupted
from ncn.training.run_folder import RunFolder
from ncn.training.session import Diverged
from ncn.training.train import train


def run_job(job: Mapping[str, Any], say: Callable[[str], None] | None = None) -> list[str]:
    """Do one run, or the rest of it, and return its warnings, which also go to `say` as they come.

    `job` has the keys recipe (as JSON), data, valid, start (may be None) and out. A run whose loss is no longer a
    number ends with a summary that says so.
    """
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        if say:
            say(text)

    recipe, out = Recipe.parse(job["recipe"]), Path(job["out"])
    try:
        train(recipe, job["data"], out, valid=job["valid"], start=job["start"], resume=True, progress=False, say=warn)
    except Diverged as problem:
        warn(str(problem))
        lines = RunFolder.open(out).metrics()
        write_json(out / "summary.json", {"diverged": True, "steps": lines[-1]["step"] if lines else 0})
    return warnings


def main() -> None:
    # What is printed by whatever library goes to standard error; the answers have standard output for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(line)
        jobs.put(None)
        os.kill(os.getpid(), signal.SIGTERM)  # training looks out for it, and saves

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := jobs.get()) is not None:
            try:
                run_job(json.loads(line), lambda text: answer(say=text))
            except UserError as error:
                answer(error=str(error))
            else:
                answer(done=True)
    except (Interrupted, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
