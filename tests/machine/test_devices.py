"""Where to compute, and in which precision, follows from what the machine is."""

from __future__ import annotations

import pytest
import torch

from ncn.machine import devices
from ncn.machine.devices import arithmetic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("described", "expected"), [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)]
)
def test_the_maker_is_what_the_system_says(described: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.Path, "read_text", lambda _: described)
    assert devices._made_by_amd() == expected


@pytest.mark.parametrize(
    ("amd", "amx", "avx512_bf16", "expected"),
    [
        (True, False, True, torch.bfloat16),
        (True, False, False, None),
        (False, True, True, torch.bfloat16),
        (False, False, True, None),
    ],
)
def test_bfloat16_is_for_processors_that_are_fast_at_it(
    amd: bool, amx: bool, avx512_bf16: bool, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MADE_BY_AMD", amd)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert arithmetic("auto", CPU) == expected
    assert arithmetic("bfloat16", CPU) == torch.bfloat16
    assert arithmetic("float32", CPU) is None
