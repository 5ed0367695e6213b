"""The check of a controller on a base, from its first step to its last, on a tiny base."""

import contextlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ncn.data.tokenizer import SEPARATOR, Tokenizer

pytest.importorskip("transformers")
TOOL = Path(__file__).parents[2] / "tools" / "check_base.py"
STORIES = [f"The cat sat {n} times on the mat. Then a dog ran to it and they played." for n in range(300)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_base_passes_and_one_that_cannot_be_disabled_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ncn.retrofit.attach import AttachedController
    from retrofits import base

    tokenizer = Tokenizer.train(STORIES, 280)
    folder = tmp_path / "tiny"
    base("llama", vocab_size=288, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save(folder)
    for name, part in (("text", STORIES[:250]), ("held-out", STORIES[250:])):
        (tmp_path / f"{name}.txt").write_text(f"\n{SEPARATOR}\n".join(part), "utf-8")
    arguments = [str(folder), "--text", "text.txt", "--held-out", "held-out.txt", "--out", "out", "--tokens", "2_000",
                 "--eval-tokens", "1_000", "batch_size=2", "context=32"]  # fmt: skip

    command = [sys.executable, str(TOOL), *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "out" / "check.json").read_text("utf-8"))
    equal = found["equal to the base, bit for bit"]
    assert len(equal) == 6
    assert all(equal.values())
    assert found["equal in two fresh processes"]
    assert found["largest change of a logit by the trained controller"] > 0
    assert found["generate"].startswith("Once upon a time")
    assert found["controller_bytes"] == (tmp_path / "out" / "run" / "model" / "controller.safetensors").stat().st_size
    assert (tmp_path / "out" / "scan.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(AttachedController, "disable", lambda self: contextlib.nullcontext())
    out = tmp_path / "out"
    found = runpy.run_path(str(TOOL))["compare"](str(folder), out / "run" / "model", out / "held-out")
    unequal = [name for name, same in found["equal to the base, bit for bit"].items() if not same]
    assert unequal == ["the trained one disabled"]
