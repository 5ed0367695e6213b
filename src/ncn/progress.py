"""How far a long pass over data has come: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from types import TracebackType

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
