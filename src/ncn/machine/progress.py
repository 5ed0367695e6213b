"""How far long work has come, on standard error: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_LINE_SECONDS = 10.0
Shown = TypeVar("Shown", bound="_Shown")


class _Shown:
    """A bar with one changing text, or that text in lines."""

    def __init__(self, title: str, total: int, done: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.title, self.total, self.first, self.enabled = title, total, done, enabled
        self.begun = self.noted = time.monotonic()
        console = Console(stderr=True)
        self.bar = Progress(*self.columns(), console=console) if enabled and console.is_terminal else None

    def columns(self) -> "tuple[ProgressColumn, ...]":
        raise NotImplementedError

    def __enter__(self: Shown) -> Shown:
        if self.bar:
            self.task = self.bar.add_task(self.title, total=self.total or None, completed=self.first, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int, facts: str, line: str, now: float) -> None:
        """`facts` beside the bar, at `done`; without a bar, `line` unless one was printed a moment ago."""
        if self.bar:
            self.bar.update(self.task, completed=done, facts=facts)
        elif line and (now - self.noted >= _LINE_SECONDS):
            self.noted = now
            print(line, file=sys.stderr, flush=True)


class ProgressReport(_Shown):
    """Bytes read of a known total, tokens made, their rate, and the time left.

    Args:
        title: what is being done.
        total_bytes: bytes to read, 0 where that is not known; then no time left is shown. Where tokens are read, and
            `advance` is called, the tokens.
        enabled: False shows nothing.
    """

    def __init__(self, title: str, total_bytes: int, enabled: bool) -> None:
        super().__init__(title, total_bytes, 0, enabled)
        self.first_tokens: int | None = None
        self.read = 0

    def advance(self, tokens: int) -> None:
        """Report that so many more tokens were read."""
        self.first_tokens = 0
        self.read += tokens
        self.update(self.read, self.read)

    def columns(self) -> "tuple[ProgressColumn, ...]":
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        title, facts, left = (TextColumn(text) for text in ("{task.description}", "{task.fields[facts]}", "left"))
        return title, BarColumn(), facts, TimeElapsedColumn(), left, TimeRemainingColumn()

    def update(self, done_bytes: int, tokens: int) -> None:
        """Report `done_bytes` read and `tokens` made since the very beginning, interrupted runs included."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self.first_tokens is None:
            self.first_tokens = tokens
        done_bytes = min(done_bytes, self.total or done_bytes)  # the last window may read beyond what was asked for
        rate = (tokens - self.first_tokens) / max(now - self.begun, 1e-9)
        facts = f"{tokens / 1e6:.1f} M tokens, {rate:,.0f} tokens/s"
        self.show(done_bytes, facts, f"{self.title}: {self._share(done_bytes, now - self.begun)}{facts}", now)

    def _share(self, done_bytes: int, seconds: float) -> str:
        if not self.total or not done_bytes:
            return ""
        left = seconds * (self.total - done_bytes) / done_bytes
        return f"{done_bytes / self.total:.1%}, {left:.0f} s left, "


class TrainingProgress(_Shown):
    """Steps done of a known total, with loss, bits per byte, tokens a second and the time left."""

    def __init__(self, total_steps: int, tokens_per_step: int, step: int, enabled: bool) -> None:
        super().__init__("step", total_steps, step, enabled)
        self.tokens_per_step, self.facts = tokens_per_step, ""

    def columns(self) -> "tuple[ProgressColumn, ...]":
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        title, facts, left = (TextColumn(text) for text in ("{task.description}", "{task.fields[facts]}", "left"))
        return title, MofNCompleteColumn(), BarColumn(bar_width=20), facts, TimeRemainingColumn(compact=True), left

    def update(self, step: int, line: Mapping[str, Any] | None) -> None:
        """Report `step` steps done, and a line of metrics if one was just logged."""
        if not self.enabled:
            return
        now = time.monotonic()
        if line is not None:
            speed = (step - self.first) * self.tokens_per_step / max(now - self.begun, 1e-9)
            self.facts = f"loss {line['loss']:.3f}  {line['bits_per_byte']:.3f} bits/byte  {speed:,.0f} tokens/s"
        if step == self.total:
            self.noted = -_LINE_SECONDS  # the last line is printed in any case
        left = (now - self.begun) / max(step - self.first, 1) * (self.total - step)
        text = f"step {step}/{self.total}  {self.facts}  {left:.0f} s left"
        self.show(step, self.facts, text if self.facts else "", now)


class TokensProgress(_Shown):
    """Tokens trained over many runs, of a known total, with the rate and the time left."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        super().__init__("runs", total, done, enabled)
        self.last = done

    def columns(self) -> "tuple[ProgressColumn, ...]":
        from rich.progress import BarColumn, TextColumn

        return TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[facts]}")

    def update(self, done: int, finished: int, runs: int) -> None:
        """Report `done` tokens in all and `finished` of so many `runs`."""
        if not self.enabled:
            return
        now = time.monotonic()
        if done < self.last:  # a run that goes on begins at its checkpoint, before the end of its log
            self.first, self.begun = done, now
        self.last = done
        speed = (done - self.first) / max(now - self.begun, 1e-9)
        left = f"{(self.total - done) / speed / 60:.1f} min left" if speed else ""
        facts = f"{finished}/{runs}  {done / 1e6:.2f} of {self.total / 1e6:.2f} M tokens  {speed:,.0f} tokens/s  {left}"
        self.show(done, facts, f"runs {facts}", now)
