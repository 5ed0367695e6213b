"""What a step frees serves the next one."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from ncn.machine.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():  # 64 MB, in pieces large and small
    held = [torch.ones(size << 18) for size in (32, 1, 8, 2, 16, 4, 1)]

if KEEP:
    assert keep_freed_memory()
for _ in range(5):
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_pages_are_not_asked_for_again() -> None:
    def faults(keep: bool) -> int:
        program = STEPS.replace("KEEP", str(keep))
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert faults(keep=True) < 100
    assert faults(keep=False) > 1000
