"""Speed and memory, as ratios within one run: `python -m benchmarks`."""

import os

# as the command line sets it, before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
