"""Repositories by name, from a cache of the Hugging Face library as a download leaves it, with no network.

The library reads where its cache is when it is imported, and so every test runs a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.machine.hub import from_hub, is_hub_name

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytestmark = pytest.mark.xdist_group("transformers")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """An empty cache."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def repository(hub: Path, name: str) -> Path:
    """The folder of a repository's files in the cache."""
    kept = hub / f"models--{name.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    files = kept / "snapshots" / COMMIT
    files.mkdir(parents=True)
    return files


def ran(hub: Path, script: str, *words: object) -> str:
    """What a script prints, run beside that cache."""
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HOME": str(hub.parent / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=environment, check=False, cwd=hub.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_form_of_a_name() -> None:
    assert is_hub_name("HuggingFaceTB/SmolLM2-135M")
    assert not any(map(is_hub_name, ("gpt2", "/a/b", "./b", "../b", "a/b/c", "a/", "data/tokenizer.json", "~/b")))


def test_a_repository_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no folder 'nobody/nothing', and it .* hub \(x\.json\): ") as error:
        from_hub("nobody/nothing", ["x.json"])
    assert "\n" not in str(error.value)


LOAD = """
import sys
from ncn import Tokenizer, UserError
for name in sys.argv[1:]:
    try:
        print(Tokenizer.load(name).fingerprint)
    except UserError as error:
        print(error)
"""


def test_a_tokenizer_by_name_and_a_folder_of_that_name_before_it(hub: Path) -> None:
    ours, other = (Tokenizer.train(["the cat sat on the mat"] * 4, size) for size in (260, 270))
    ours.save(repository(hub, "someone/words"))
    other.save(repository(hub, "someone/else"))
    other.save(hub.parent / "someone" / "words-here")
    other.save(repository(hub, "someone/words-here"))
    ours.save(hub.parent / "someone" / "words-here")
    (repository(hub, "someone/slow") / "vocab.json").write_text("{}")
    names = ["someone/words", "someone/else", "someone/words-here", "someone/slow", "nobody/nothing", "data/gone.json"]
    found = ran(hub, LOAD, *names).splitlines()
    assert found[:3] == [ours.fingerprint, other.fingerprint, ours.fingerprint]
    assert found[3].startswith("someone/slow holds no tokenizer.json on the Hugging Face hub")
    assert found[4].startswith("no folder 'nobody/nothing', and it cannot be had from the Hugging Face hub (tokenizer")
    assert found[5].startswith("no tokenizer at data/gone.json")
    assert len(found) == len(names)


COMMANDS = """
import contextlib, json, sys
import ncn
from ncn.cli import main

def run(line, errors=sys.stderr):
    sys.argv = ["ncn", *line.split()]
    try:
        with contextlib.redirect_stderr(errors):
            main()
    except SystemExit as stop:
        return stop.code

settings = "tokens=96 batch_size=2 context=16 controller.width=8 controller.hidden=8"
assert not run("prepare text.txt --tokenizer someone/base --out data")
assert not run(f"train --base someone/base --data data --out run {settings}")
assert json.load(open("run/model/controller.json"))["base_name"] == "someone/base"
for name in ("someone/ours", "someone/controller"):
    model, tokenizer = ncn.load(name)
    print(type(model).__name__, tokenizer.vocab_size)
assert not run("prepare text.txt --vocab-size 265 --out other")
assert run(f"train --base someone/base --data other --out refused {settings}", sys.stdout) == 1
"""


def test_a_base_and_its_tokenizer_a_model_and_a_controller_by_name(hub: Path) -> None:
    pytest.importorskip("transformers")
    import ncn
    from ncn.models.saved import save_model
    from ncn.retrofit.model import RetrofittedModel
    from ncn.retrofit.recipe import retrofit_recipe
    from retrofits import base

    tokenizer = Tokenizer.train(["the cat sat on the mat", "a dog ran"] * 4, 270)
    (hub.parent / "text.txt").write_text(
        "\n<|endoftext|>\n".join(f"the cat sat {n} times on the mat" for n in range(99))
    )
    model = base("llama", vocab_size=280)
    place = repository(hub, "someone/base")
    model.save_pretrained(place)
    tokenizer.save(place)
    shape = {"vocab_size": 270, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 32}
    ours = ncn.ModulatedTransformer(ncn.NCNConfig(**shape, separator_id=tokenizer.separator_id))
    save_model(ours, repository(hub, "someone/ours"), tokenizer)
    recipe = retrofit_recipe(place)
    handle = ncn.attach(model)
    model = RetrofittedModel(handle, recipe.model, "someone/base")
    save_model(model, repository(hub, "someone/controller"), tokenizer)

    said = ran(hub, COMMANDS)

    assert "ModulatedTransformer 270\nRetrofittedModel 270\n" in said
    assert (
        "error: other was prepared with another tokenizer than the base's; prepare it with --tokenizer someone/base"
        in said
    )
    assert not (hub.parent / "refused").exists()
