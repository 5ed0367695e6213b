"""Speed and memory, as ratios within one run: `python -m benchmarks`."""

import os

from ncn.memory import keep_freed_memory

# as the command line has them, before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
keep_freed_memory()
