"""How far long work has come."""

import pytest

import ncn.machine.progress
from ncn.machine.progress import ProgressReport, TokensProgress


def test_a_run_that_goes_on_at_its_checkpoint_does_not_turn_the_rate_negative(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(ncn.machine.progress.time, "monotonic", lambda: clock[0])
    bar = TokensProgress(1_000_000, 300_000, enabled=True)
    for seconds, done in ((20, 100_000), (40, 200_000), (60, 300_000)):  # its log was ahead of its checkpoint
        clock[0] = float(seconds)
        bar.update(done, 0, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "runs 0/2  0.30 of 1.00 M tokens  5,000 tokens/s  2.3 min left"
    assert not any("-" in line for line in lines)


def test_a_window_beyond_what_was_asked_for_ends_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(ncn.machine.progress.time, "monotonic", lambda: clock[0])
    bar = ProgressReport("evaluate", 1000, enabled=True)
    for _ in range(2):
        clock[0] += 20
        bar.advance(512)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluate: 51.2%, 19 s left, 0.0 M tokens, 26 tokens/s",
        "evaluate: 100.0%, 0 s left, 0.0 M tokens, 26 tokens/s",
    ]
