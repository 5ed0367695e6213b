"""Do two checkouts compute the same? Train, write, compare, diagnose, scan and retrofit with both.

Usage: python tools/compare_versions.py OTHER_CHECKOUT --out DIR

Everything is computed with the checkout at OTHER_CHECKOUT, kept in DIR/other and not computed again, and then with the
one that this file belongs to, in DIR/this. Numbers, texts and weights must be equal bit for bit; what depends on the
clock or the machine is left out. Then this checkout continues a run that the other was interrupted in, and reads the
model and the controller that the other saved. Ends with 0 if nothing differs. It takes some minutes.
"""

import argparse
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Once upon a time, there was a tiny dragon who loved to", "Tom and Anna went to the", "The dog"]
SMALL = ["tokens=40_000", "batch_size=8", "context=128", "precision=float32", "log_every=2",
         "eval_every=20", "eval_tokens=4000", "checkpoint_every=10"]  # fmt: skip
OF_THE_MACHINE = re.compile(
    r"second|time|speed|commit|dirty|date|version|path|command|env|memory|per_hour|cores|_at$|^base(_name)?$"
)
FILES_OF_THE_MACHINE = {"env.json", "timing.json", "launch.json", "journal.json"}
LOGITS = """
import sys, torch, ncn
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ncn.load_controller(base, sys.argv[2])
ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    once = base(input_ids=ids, use_cache=False).logits
    written = base.generate(ids[:1, :8], max_new_tokens=20, do_sample=False, pad_token_id=0)
save_file({"logits": once.contiguous(), "written": written.contiguous()}, sys.argv[3])
"""


class Checkout:
    """The command `ncn` of a checkout, in a folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.environment = os.environ | {
            "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg",
        }  # fmt: skip

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, module: bool = True) -> str:
        print("  ", *(word if len(word) < 60 else word[:57] + "..." for word in arguments), flush=True)
        process = self.python(*(["-m", "ncn"] if module else []), *arguments)
        out, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{' '.join(arguments)} ended with {process.returncode} in {self.root}:\n{out}{errors}")
        return out

    def interrupted(self, run: str, *arguments: str) -> None:
        """Train, and press Ctrl-C in the middle."""
        process = self.python("-m", "ncn", "train", *arguments)
        metrics = self.folder / run / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 6):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert (self.folder / run / "checkpoints").is_dir(), "the run ended before it could be interrupted"


def texts(folder: Path) -> None:
    """A few hundred of the bundled stories, and others to measure on."""
    packed = (ROOT / "src" / "ncn" / "assets" / "tinystories_train.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode("utf-8")
    (folder / "train.txt").write_text(text[:300_000], "utf-8")
    (folder / "valid.txt").write_text(text[400_000:440_000], "utf-8")


def base_model(folder: Path) -> None:
    """A small random Llama for the vocabulary of the data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    model.save_pretrained(folder / "base")


def compute(ncn: Checkout) -> None:
    """Everything that is compared."""
    folder = ncn.folder
    ncn("prepare", "train.txt", "--vocab-size", "512", "--attributes", "--out", "data", "--workers", "1")
    ncn("prepare", "valid.txt", "--tokenizer", "data", "--attributes", "--out", "valid", "--workers", "1")
    data = ["--data", "data", "--valid", "valid"]
    base_model(folder)
    shutil.copy(folder / "data" / "tokenizer.json", folder / "base")
    runs = {
        "run": ["--preset", "mini", *SMALL],
        "bfloat16": ["--preset", "mini", *SMALL, "precision=bfloat16", "accumulation=2", "optimizer=adamw"],
        "sliders": ["--preset", "steering-mini", *SMALL, "input_dropout=0.3"],
        "baseline": ["--baseline", *SMALL],
        "retrofit": ["--base", "base", *SMALL, "homeostatic_weight=0.03"],
    }
    for name, settings in runs.items():
        ncn("train", *data, "--out", name, *settings)
    ncn.interrupted("half", *data, "--out", "half", *runs["run"])
    ncn(
        "train", *data, "--out", "layers", "--start", "run", *SMALL, "only_inputs=true", "input_dropout=0.2",
        "controller.sliders=[length,dialogue]", "controller.sliders_enter=layers",
    )  # fmt: skip
    written = {f"{model} {n}": ncn("generate", model, prompt, "--temperature", "0", "--max-tokens", "80")
               for model in ("stories-mini", "run", "retrofit") for n, prompt in enumerate(PROMPTS)}  # fmt: skip
    for n, prompt in enumerate(PROMPTS):
        settings = ["--set", "dialogue=0.9", "--set", "length=0.2:0.8", "--guidance", "2"]
        written[f"sliders {n}"] = ncn(
            "generate", "sliders", prompt, "--temperature", "0", "--max-tokens", "80", *settings
        )
    (folder / "written.json").write_text(json.dumps(written, indent=1))
    for model in ("stories-mini", "run", "retrofit"):
        own = ["valid"] if model != "stories-mini" else ["valid.txt"]
        ncn("evaluate", model, "--data", *own, "--max-tokens", "4000", "--json", f"evaluated-{model}.json")
        ncn("scan", model, PROMPTS[0], "--out", f"scan-{model}.json", "--out", f"scan-{model}.html")
    ncn("diagnose", "run", "--data", "valid", "--out", "diagnosis", "--max-tokens", "4000")
    ncn(
        "ab", "--data", "data", "--valid", "valid", "--out", "ab", "--arms", "baseline,ncn", "--seeds", "2",
        "--tokens", "12k", "--tune-tokens", "6k", "batch_size=8", "context=128", "precision=float32",
    )  # fmt: skip
    ncn("-c", LOGITS, "base", "retrofit/model", "logits.safetensors", module=False)


def facts(value: Any) -> Any:
    """What is left of a JSON value without the clock and the machine."""
    if isinstance(value, dict):
        return {key: facts(part) for key, part in value.items() if not OF_THE_MACHINE.search(key)}
    return [facts(part) for part in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, place: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, parts in enumerate(zip(one, other, strict=True)):
            yield from differences(*parts, f"{place}[{number}]")
    elif one != other and not (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other)):
        yield f"{place}: {str(one)[:80]} and {str(other)[:80]}"


def compared(one: Path, other: Path) -> Iterator[str]:
    """In what two files differ."""
    from safetensors.torch import load_file

    if one.suffix == ".safetensors":
        tensors = load_file(one), load_file(other)
        if tensors[0].keys() != tensors[1].keys():
            yield f"{one.name}: other tensors"
        else:
            yield from (f"{one.name}: {name}" for name in tensors[0] if not tensors[0][name].equal(tensors[1][name]))
    elif one.suffix in (".json", ".jsonl"):
        read = json.loads if one.suffix == ".json" else lambda text: [json.loads(line) for line in text.splitlines()]
        yield from differences(facts(read(one.read_text())), facts(read(other.read_text())), one.name)
    elif one.read_bytes() != other.read_bytes():
        yield one.name


def compare(one: Path, other: Path, *, within: str = "") -> tuple[int, list[str]]:
    """How many files two folders were compared in, and what differs."""
    kinds = {".json", ".jsonl", ".safetensors", ".bin"}  # pages are made of these, and tell times and places
    found: dict[Path, None] = {}
    for folder in (one, other):
        for path in sorted(folder.rglob("*")):
            if path.suffix in kinds and path.name not in FILES_OF_THE_MACHINE and "half" not in path.parts:
                found[path.relative_to(folder)] = None
    problems: list[str] = []
    number = 0
    for path in found:
        if not ((one / path).is_file() and (other / path).is_file()):
            problems.append(f"{path} is in one of the two only")
            continue
        number += 1
        problems += [f"{path.parent}/{problem}" for problem in compared(one / path, other / path)]
    return number, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folders = {"other": arguments.out / "other", "this": arguments.out / "this"}
    for name, root in (("other", arguments.other.resolve()), ("this", ROOT)):
        if (folders[name] / "done").is_file() and name == "other":
            continue
        shutil.rmtree(folders[name], ignore_errors=True)
        folders[name].mkdir(parents=True)
        texts(folders[name])
        print(f"{name}: {root}", flush=True)
        compute(Checkout(root, folders[name].resolve()))
        (folders[name] / "done").touch()

    number, problems = compare(folders["other"], folders["this"])
    across = arguments.out / "across"  # what the other left, gone on with and read by this one
    shutil.rmtree(across, ignore_errors=True)
    shutil.copytree(folders["other"], across)
    ncn = Checkout(ROOT, across.resolve())
    print("this one reads and goes on with what the other wrote")
    ncn("train", "--data", "data", "--valid", "valid", "--out", "half", "--resume", "--preset", "mini", *SMALL)
    (across / "half").rename(across / "continued")
    for path in (across / "run").rglob("*.safetensors"):
        same = across / "continued" / path.relative_to(across / "run")
        problems += [f"continued/{problem}" for problem in compared(path, same)] if same.is_file() else []
    whole, continued = (across / run / "metrics.jsonl" for run in ("run", "continued"))
    problems += [f"continued/{found}" for found in compared(whole, continued)]
    (across / "written.json").unlink()
    ncn("evaluate", "sliders", "--data", "valid", "--max-tokens", "4000", "--json", "again.json")
    ncn("-c", LOGITS, "base", "retrofit/model", "again.safetensors", module=False)
    logits = (across / f"{name}.safetensors" for name in ("logits", "again"))
    problems += [f"read again: {found}" for found in compared(*logits)]
    print(f"{number} files compared; {len(problems)} differences")
    for problem in problems[:60]:
        print("  ", problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
