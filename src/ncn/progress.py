"""How far a long pass over data has come: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_LINE_SECONDS = 10.0


class ProgressReport:
    """Bytes read of a known total, tokens made, their rate, and the time left, on standard error.

    Args:
        title: what is being done.
        total_bytes: bytes to read, 0 where that is not known; then no time left is shown.
        enabled: False shows nothing.
    """

    def __init__(self, title: str, total_bytes: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.title, self.total_bytes, self.enabled = title, total_bytes, enabled
        self.begun = self.noted = time.monotonic()
        self.first_tokens: int | None = None
        console = Console(stderr=True)
        self.bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            if enabled and console.is_terminal
            else None
        )

    def __enter__(self) -> "ProgressReport":
        if self.bar:
            self.task = self.bar.add_task(self.title, total=self.total_bytes or None, counts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done_bytes: int, tokens: int) -> None:
        """Report `done_bytes` read and `tokens` made since the very beginning, interrupted runs included."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self.first_tokens is None:
            self.first_tokens = tokens
        rate = (tokens - self.first_tokens) / max(now - self.begun, 1e-9)
        counts = f"{tokens / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s"
        if self.bar:
            self.bar.update(self.task, completed=done_bytes, counts=counts)
        elif now - self.noted >= _LINE_SECONDS:
            self.noted = now
            print(f"{self.title}: {self._share(done_bytes, now - self.begun)}{counts}", file=sys.stderr, flush=True)

    def _share(self, done_bytes: int, seconds: float) -> str:
        if not self.total_bytes or not done_bytes:
            return ""
        left = seconds * (self.total_bytes - done_bytes) / done_bytes
        return f"{done_bytes / self.total_bytes:.1%}, {left:.0f} s left, "


class TrainingProgress:
    """Steps done of a known total, with loss, bits per byte, tokens a second and the time left, on standard error.

    A bar on a terminal; elsewhere a plain line now and then.
    """

    def __init__(self, total_steps: int, tokens_per_step: int, step: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.total, self.tokens_per_step, self.first, self.enabled = total_steps, tokens_per_step, step, enabled
        self.begun = self.noted = time.monotonic()
        self.facts = ""
        console = Console(stderr=True)
        self.bar = (
            Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=console,
            )
            if enabled and console.is_terminal
            else None
        )

    def __enter__(self) -> "TrainingProgress":
        if self.bar:
            self.task = self.bar.add_task("", total=self.total, completed=self.first, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        """Report `step` steps done, and a line of metrics if one was just logged."""
        if not self.enabled:
            return
        now = time.monotonic()
        if line is not None:
            speed = (step - self.first) * self.tokens_per_step / max(now - self.begun, 1e-9)
            self.facts = f"loss {line['loss']:.3f}  {line['bits_per_byte']:.3f} bits/byte  {speed:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, facts=self.facts)
        elif self.facts and (now - self.noted >= _LINE_SECONDS or step == self.total):
            self.noted = now
            left = (now - self.begun) / (step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {self.facts}  {left:.0f} s left", file=sys.stderr, flush=True)


class TokensProgress:
    """Tokens trained over many runs, of a known total, with the rate and the time left, on standard error.

    A bar on a terminal; elsewhere a plain line now and then.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.total, self.first, self.enabled = total, done, enabled
        self.begun = self.noted = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[facts]}"))
        self.bar = Progress(*columns, console=console) if enabled and console.is_terminal else None

    def __enter__(self) -> "TokensProgress":
        if self.bar:
            self.task = self.bar.add_task("runs", total=self.total, completed=self.first, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, finished: int, runs: int) -> None:
        """Report `done` tokens in all and `finished` of so many `runs`."""
        if not self.enabled:
            return
        now = time.monotonic()
        speed = (done - self.first) / max(now - self.begun, 1e-9)
        left = f"{(self.total - done) / speed / 60:.1f} min left" if speed else ""
        facts = f"{finished}/{runs}  {done / 1e6:.2f} of {self.total / 1e6:.2f} M tokens  {speed:,.0f} tokens/s  {left}"
        if self.bar:
            self.bar.update(self.task, completed=done, facts=facts)
        elif now - self.noted >= _LINE_SECONDS:
            self.noted = now
            print(f"runs {facts}", file=sys.stderr, flush=True)
