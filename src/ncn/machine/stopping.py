"""Stopping between two steps, rather than in the middle of one, when the user or the system asks for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Work was stopped by Ctrl-C or SIGTERM after its state was saved."""


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is looked at between steps; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
