"""A controller on a base of yours, from the first step to the last: attach, train, evaluate, write, scan, load, detach.

Usage: python tools/check_base.py BASE --text train.txt --held-out held-out.txt --out DIR [--tokens 24_000] [settings]

Every verb is called as a user would; settings are those of `ncn train`. What should be equal bit for bit is compared,
the loading in a process of its own. DIR gets check.json, the brain scan, the data and the run, which is not trained
again if it is there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ncn
from ncn.data.dataset import TokenDataset
from ncn.machine.environment import describe_environment
from ncn.machine.files import write_json

PROMPT = "Once upon a time, a brave little goat"
SCANNED = "Timmy wanted an apple. He looked in the box, but it was empty."


def verb(*arguments: object) -> tuple[str, float]:
    """What `ncn` prints, and the seconds it takes."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "ncn", *map(str, arguments)]
    print("$ ncn", *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip(), time.monotonic() - begun


def compare(base: str, controller: Path, held_out: Path) -> dict[str, Any]:
    """What equals the base bit for bit, and what does not; meant for a process that has seen nothing else."""
    ids = torch.tensor(TokenDataset.open(held_out).read(0, 96))[None].long()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))

    @torch.no_grad()
    def logits() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids).logits
        return found

    plain = logits()
    handle = ncn.attach(model)
    attached = logits()
    handle.detach()
    handle = ncn.load_controller(model, controller)
    steered = logits()
    with handle.disable():
        disabled = logits()
    with handle.frozen_at("neutral"):
        neutral = logits()
    parameters = handle.num_parameters()
    handle.detach()
    return {
        "base_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "controller_parameters": parameters,
        "equal to the base, bit for bit": {
            "a new controller attached": torch.equal(attached, plain),
            "the trained one disabled": torch.equal(disabled, plain),
            "the trained one frozen at neutral": torch.equal(neutral, plain),
            "detached": torch.equal(logits(), plain),
            "all weights afterwards": all(
                torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
            ),
            "keys and attributes afterwards": list(before) == list(model.state_dict())
            and attributes == set(vars(model)),
        },
        "largest change of a logit by the trained controller": (steered - plain).abs().max().item(),
        "logits": steered.double().sum().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="24_000", help="to train on")
    parser.add_argument("--eval-tokens", default="4_000", help="of the held-out text to evaluate on")
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    out, run = options.out, options.out / "run"
    if options.compare:
        print(json.dumps(compare(options.base, run / "model", out / "held-out")))
        return
    seconds: dict[str, float] = {}
    said: dict[str, str] = {}
    for name, arguments in {
        "prepare": ["prepare", *options.text, "--tokenizer", options.base, "--out", out / "data"],
        "prepare held-out": ["prepare", options.held_out, "--tokenizer", options.base, "--out", out / "held-out"],
        "train": ["train", "--base", options.base, "--data", out / "data", "--out", run, "--resume",
                  f"tokens={options.tokens}", *options.settings],
        "evaluate": ["evaluate", run, "--data", out / "held-out", "--context", 256, "--max-tokens", options.eval_tokens,
                     "--json", out / "evaluation.json"],
        "generate": ["generate", run, PROMPT, "--max-tokens", 60, "--seed", 1],
        "scan": ["scan", run, SCANNED, "--out", out / "scan.png"],
    }.items():  # fmt: skip
        said[name], seconds[name] = verb(*arguments)
        print(said[name], flush=True)
    again = [sys.executable, __file__, *sys.argv[1:], "--compare"]
    fresh = [json.loads(subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(2)]
    measured = json.loads((out / "evaluation.json").read_text("utf-8"))
    found = {
        "base": Path(options.base).name,
        **fresh[0],
        "equal in two fresh processes": fresh[0] == fresh[1],
        "controller_bytes": (run / "model" / "controller.safetensors").stat().st_size,
        "seconds": seconds,
        "held-out bits per byte": {
            "base": measured["frozen"]["all"]["neutral"]["bits_per_byte"],
            "with the controller": measured["evaluation"]["bits_per_byte"],
            "tokens": measured["evaluation"]["tokens"],
        },
        "generate": said["generate"],
        "environment": describe_environment(torch.device("cpu")),
    }
    write_json(out / "check.json", found)
    print(json.dumps(found, indent=1))
    if not all((*found["equal to the base, bit for bit"].values(), found["equal in two fresh processes"])):
        sys.exit("not everything that should be equal is")


if __name__ == "__main__":
    main()
