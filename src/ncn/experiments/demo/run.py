"""The demonstration: a model with a controller and its static twin, on the same batches, then a story and a scan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncn.config.recipe import Recipe
from ncn.data.dataset import TokenDataset
from ncn.data.prepare import prepare
from ncn.inference.generate import generate
from ncn.lab.arms import widened_baseline
from ncn.machine.files import write_json
from ncn.models.saved import load
from ncn.scans.recording import scan
from ncn.training.begin import fit_to_data
from ncn.training.run_folder import RunFolder
from ncn.training.train import train

PROMPT = "Once upon a time, there was a tiny dragon who loved to"
SCANNED = "Timmy wanted an apple. He looked in the box, but it was empty."


@dataclass(frozen=True)
class Demo:
    """What the demonstration found, and where it is."""

    arms: dict[str, dict[str, Any]]
    story: str
    files: list[Path]

    @property
    def difference(self) -> float:
        """Bits per byte of the NCN less those of its twin: negative where the NCN is better."""
        return float(self.arms["ncn"]["validation_bits_per_byte"] - self.arms["twin"]["validation_bits_per_byte"])


def run_demo(
    out: Path,
    *,
    preset: str = "mini",
    overrides: tuple[str, ...] = (),
    source: str = "tinystories-sample",
    valid_source: str = "tinystories-sample-valid",
    progress: bool = True,
) -> Demo:
    """Prepare the text, train both arms, and leave everything in `out`.

    Interrupted, it goes on where it was when it is called again.
    """
    recipe = Recipe.read(preset, overrides)
    prepare([source], out / "data", vocab_size=recipe.model.vocab_size, progress=progress)
    prepare([valid_source], out / "valid", tokenizer=str(out / "data"), progress=progress)
    recipe = fit_to_data(recipe, TokenDataset.open(out / "data"))
    arms = {"ncn": recipe, "twin": Recipe(model=widened_baseline(recipe.model), train=recipe.train)}
    results = {}
    for name, arm in arms.items():
        print(f"training the {'model with a controller' if name == 'ncn' else 'static twin'} ...", flush=True)
        results[name] = train(arm, out / "data", out / name, valid=out / "valid", resume=True, progress=progress)
    model, tokenizer = load(str(out / "ncn"))
    story = PROMPT + "".join(generate(model, tokenizer, PROMPT, temperature=0.7, top_p=0.95, seed=7))
    (out / "story.txt").write_text(story + "\n", "utf-8")
    picture = scan(model, tokenizer, SCANNED, name=f"{preset}, trained by the demonstration")
    files = [out / "scan.png", out / "scan.html", out / "curves.png", out / "story.txt"]
    for path in files[:2]:
        picture.save(path)
    _draw_curves(out, files[2])
    write_json(out / "demo.json", results)
    return Demo(results, story, files)


def _draw_curves(out: Path, path: Path) -> None:
    from ncn.pages.curves import compare_curves

    labels = {"ncn": "with controller", "twin": "static twin, equal parameters"}
    curves = {
        label: [(line["tokens"], line["loss"]) for line in RunFolder.open(out / name).metrics()]
        for name, label in labels.items()
    }
    # a point is the mean of the steps since the one before, and the last one may be that of a step or two
    compare_curves({label: curve[:-1] if _ends_short(curve) else curve for label, curve in curves.items()}, path)


def _ends_short(curve: list[tuple[int, float]]) -> bool:
    spans = [after - before for (before, _), (after, _) in itertools.pairwise(curve)]
    return len(spans) > 1 and spans[-1] < spans[0] / 2
