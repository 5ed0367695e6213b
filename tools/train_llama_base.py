"""Train a small Llama of the transformers library on prepared data: a base to put controllers and adapters on.

Usage: ncn prepare tinystories-sample --vocab-size 4096 --out data
       python tools/train_llama_base.py --data data --out base      (again after an interruption, it goes on)

`base` is then an ordinary Hugging Face folder with config.json, model.safetensors and the data's tokenizer. Checkpoints
lie in `base/checkpoints` until the end.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ncn.config.training import TrainConfig
from ncn.data.dataset import TokenDataset
from ncn.machine.devices import arithmetic, find_device
from ncn.machine.progress import TrainingProgress
from ncn.training.optimizers import (
    build_adamw,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    update,
)
from ncn.training.run_folder import RunFolder

CONTEXT = 256
EVERY = 50
"""Steps between lines; a checkpoint is written at every fourth."""


def build(data: TokenDataset) -> LlamaForCausalLM:
    """10 M parameters with a vocabulary of 4,096. The longest context leaves room for a prefix before a window."""
    separator = data.separator_id
    shape = {"hidden_size": 320, "num_hidden_layers": 7, "num_attention_heads": 5, "intermediate_size": 864}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=data.vocab_size,
            max_position_embeddings=2 * CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=separator,
            eos_token_id=separator,
            pad_token_id=separator,
            **shape,
        )
    )


def build_optimizer(model: LlamaForCausalLM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; only the matrices of the layers decay."""
    decays = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return build_adamw([{"params": decays}, {"params": rest, "weight_decay": 0.0}], config)


def main() -> None:
    """Train, save, and leave nothing else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of ncn prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=float, default=2_500_000, help="tokens to train on")
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    config = TrainConfig(
        tokens=int(arguments.tokens), batch_size=arguments.batch_size, learning_rate=arguments.learning_rate
    )

    data = TokenDataset.open(arguments.data)
    tokenizer = data.tokenizer()
    device = find_device("auto")
    autocast = arithmetic("auto", device)
    torch.manual_seed(config.seed)
    model = build(data).to(device)
    optimizer = build_optimizer(model, config)
    tokens_per_step = config.batch_size * CONTEXT
    total = math.ceil(config.tokens / tokens_per_step)
    print(f"{model.num_parameters():,} parameters, {total} steps of {tokens_per_step} tokens, autocast {autocast}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    run, first = RunFolder(arguments.out), 0
    checkpoint = run.load_checkpoint(print)
    if checkpoint:
        first = checkpoint.facts["step"]
        weights = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("optimizer.")}
        model.load_state_dict(weights, strict=False)  # the output matrix is the embedding
        load_optimizer_state(model, [optimizer], checkpoint.tensors)

    model.train()
    loss_sum = 0.0
    with TrainingProgress(total, tokens_per_step, first, True) as bar:
        for step in range(first, total):
            inputs, targets = data.batch(config.seed, step, config.batch_size, CONTEXT)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = model(input_ids=inputs.to(device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())
            loss.backward()
            update([optimizer], model.parameters(), config.clip, learning_rate_factor(config, step, total))
            optimizer.zero_grad()
            loss_sum += loss.item()
            line = None
            if (step + 1) % EVERY == 0:
                mean, loss_sum = loss_sum / EVERY, 0.0
                line = {"loss": mean, "bits_per_byte": mean / math.log(2) * data.tokens / data.text_bytes}
            bar.update(step + 1, line)
            if (step + 1) % (4 * EVERY) == 0:
                tensors = dict(model.named_parameters()) | optimizer_state(model, [optimizer])
                run.save_checkpoint(step + 1, tensors, {"step": step + 1})

    model.save_pretrained(arguments.out)
    tokenizer.save(arguments.out)
    shutil.rmtree(arguments.out / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    main()
