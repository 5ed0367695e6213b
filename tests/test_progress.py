"""How far long work has come."""

import pytest

import ncn.progress
from ncn.progress import TokensProgress


def test_a_run_that_goes_on_at_its_checkpoint_does_not_turn_the_rate_negative(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(ncn.progress.time, "monotonic", lambda: clock[0])
    bar = TokensProgress(1_000_000, 300_000, enabled=True)
    for seconds, done in ((20, 100_000), (40, 200_000), (60, 300_000)):  # its log was ahead of its checkpoint
        clock[0] = float(seconds)
        bar.update(done, 0, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "runs 0/2  0.30 of 1.00 M tokens  5,000 tokens/s  2.3 min left"
    assert not any("-" in line for line in lines)
