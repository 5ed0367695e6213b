"""Promises about the project as a whole: light imports, nothing of one machine in the repository, a small package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["transformers", "accelerate", "datasets", "pyarrow", "matplotlib", "plotly", "tensorboard"]

# Folders that exist on somebody's machine only, and addresses that only resolve inside somebody's network.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.}$~/-])/(?:home|Users|root|work|mnt|opt|private|scratch)/[\w.-]+"
    r"|\bfile:///\w"
    r"|https?://(?:localhost|\d+\.\d+\.\d+\.\d+|[\w.-]+\.(?:internal|local|lan|corp))\b"
)


def loaded_by(statement: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has loaded after the statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_importing_the_package_loads_no_optional_dependency() -> None:
    assert loaded_by("import ncn").isdisjoint(HEAVY)


def test_every_public_name_of_the_package_loads_no_optional_dependency() -> None:
    loaded = loaded_by("import ncn\nfor name in dir(ncn):\n    getattr(ncn, name)")
    assert loaded.isdisjoint(HEAVY)


def test_the_configuration_needs_no_torch() -> None:
    assert loaded_by("import ncn.config").isdisjoint(["torch", *HEAVY])


@pytest.mark.parametrize(
    "line",
    [
        "/home/ada/ncn/runs/1",
        "see /" + "root/.cache/x",
        "torch @ file:///wheels/torch.whl",
        "http://10.0.0.7:3128/simple",
        "https://pypi.internal/simple",
    ],
)
def test_the_search_for_traces_of_a_machine_finds_them(line: str) -> None:
    assert OF_ONE_MACHINE.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "src/" + "home/page.py",
        "https://pypi.org/simple",
        "https://huggingface.co/" + "root/x",
        "$HOME/" + "work/x",
        "and/or",
    ],
)
def test_the_search_for_traces_of_a_machine_finds_nothing_else(line: str) -> None:
    assert not OF_ONE_MACHINE.search(line)


def test_no_tracked_file_names_a_place_on_one_machine() -> None:
    traces = []
    for path in tracked_files():
        if path == Path(__file__) or b"\0" in (content := path.read_bytes())[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if found := OF_ONE_MACHINE.search(line):
                traces.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert not traces


def test_the_packaged_assets_stay_under_12_mb() -> None:
    assets = [path for path in tracked_files() if path.is_relative_to(ROOT / "src" / "ncn" / "assets")]
    fixtures = [path for path in tracked_files() if path.is_relative_to(ROOT / "tests") and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in assets + fixtures) < 12e6


def test_every_link_in_the_documentation_resolves() -> None:
    done = subprocess.run(
        [sys.executable, "tools/build_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
