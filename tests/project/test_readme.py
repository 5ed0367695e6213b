"""What the README shows in Python runs as it stands there, with fewer tokens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for long, short in (("tokens=500_000", "tokens=8_192"), ('"tinystories-sample"', '"tinystories-sample-valid"')):
        assert code.count(long) == 1
        code = code.replace(long, short)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    shapes, bits = ran.stdout.splitlines()[-2:]
    tokens = re.fullmatch(r"\{'gain': \(1, (\d+), 4, 2\), 'precision': \(1, \1, 4, 4\), .*\}", shapes)
    assert tokens, shapes
    assert 0 < float(bits) < 20
    assert (tmp_path / "run" / "model").is_dir()
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
