"""Train a small Llama on the Python standard library of the running interpreter and write a Hugging Face folder.

How models like models/pylm-4m come about. The defaults give 4.2 million parameters and want a GPU (minutes; on two
CPU cores hours). A killed run continues where it last saved when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
SPECIAL_TOKENS = ("<s>", "</s>")


@dataclass(frozen=True)
class Training:
    """A model and how it is trained."""

    out: Path = Path("runs/demo-model")
    """Folder to write; must not exist."""
    vocabulary: int = 4096
    """Tokens of the byte-level BPE vocabulary."""
    hidden_size: int = 256
    """Width of the model."""
    intermediate_size: int = 768
    """Width of the feed-forward layers."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""
    key_value_heads: int = 2
    """Heads of keys and values."""
    context: int = 512
    """Tokens of a training sequence."""
    batch_size: int = 32
    """Sequences of a step."""
    steps: int = 3000
    """Optimiser steps."""
    learning_rate: float = 3e-3
    """Highest learning rate; a cosine takes it to a tenth."""
    warmup: int = 100
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of the matrices."""
    validation_percent: int = 3
    """Share of the modules that is held out."""
    megabytes: float = 100.0
    """At most this much text, in order of a hash of the module names."""
    save_every: int = 250
    """Steps between two saves of the state."""
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""
    debug: bool = False
    """Show the traceback of a failure."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it continues."""
        runtime = ("out", "save_every", "device", "debug")
        return {**{k: v for k, v in asdict(self).items() if k not in runtime}, "python": sys.version.split()[0]}


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Training, description=__doc__)
    from codegemm_kernels.errors import run_command

    sys.exit(run_command(lambda: train(config), debug=config.debug))


def train(config: Training) -> dict[str, Any]:
    """Text, tokenizer, model, training, folder. Returns the JSON object of the last line."""
    import torch

    from codegemm_eval.perplexity import perplexity
    from codegemm_eval.windows import Protocol, cut_windows
    from codegemm_kernels import BadInput
    from codegemm_runtime.loading import choose_device

    if config.out.exists():
        raise BadInput(f"{config.out} exists already: choose another --out or delete it")
    started = time.monotonic()
    training, validation = split_modules(config)
    if not training or not validation:
        raise BadInput(
            f"{len(training)} modules to train on and {len(validation)} held out: "
            "raise --megabytes, or --validation-percent within 1 to 99"
        )
    texts = [path.read_text(encoding="utf-8") for path in training]
    say(f"{len(training)} modules to train on, {len(validation)} held out, {sum(map(len, texts)) / 1e6:.1f} MB")
    tokenizer = train_tokenizer(texts, config)
    tokens = encode(tokenizer, texts)
    held_out = encode(tokenizer, [path.read_text(encoding="utf-8") for path in validation])
    if len(tokens) <= config.context or len(held_out) < config.context:
        raise BadInput(f"{len(tokens)} and {len(held_out)} tokens are too few for sequences of {config.context}")
    device = choose_device(config.device)
    model = build_model(config).to(device)
    losses = optimise(model, tokens, config, device)
    windows = cut_windows(held_out, Protocol(window=config.context))
    judged = perplexity(model.to(torch.bfloat16), windows, batch_size=config.batch_size)
    write_folder(model, tokenizer, config.out)
    state_path(config).unlink(missing_ok=True)
    return {
        "out": str(config.out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(tokens),
        "steps": config.steps,
        "first_loss": losses[0],
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "perplexity": judged.perplexity,
        "seconds": time.monotonic() - started,
        "python": sys.version.split()[0],
        "text_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
    }


def split_modules(config: Training) -> tuple[list[Path], list[Path]]:
    """Modules to train on and modules held out: by a hash of the name, so that the choice needs no state."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(name.parts) and is_text(path):
            modules[hashlib.sha256(str(name).encode()).hexdigest()] = path
    parts: tuple[list[Path], list[Path]] = ([], [])
    size = 0
    for digest, path in sorted(modules.items()):
        size += path.stat().st_size
        if size > config.megabytes * 1e6:
            break
        parts[int(digest[-8:], 16) % 100 < config.validation_percent].append(path)
    return parts


def is_text(path: Path) -> bool:
    """Whether a module is UTF-8 and more than a stub; a few test data of the library are not."""
    try:
        return len(path.read_text(encoding="utf-8")) > 200
    except UnicodeDecodeError:
        return False


def train_tokenizer(texts: list[str], config: Training) -> Any:
    """A byte-level BPE tokenizer with `<s>` as token 0 and `</s>` as token 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    core.train_from_iterator(texts, trainer)
    bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, model_max_length=4 * config.context
    )


def encode(tokenizer: Any, texts: list[str]) -> Any:
    """int64 [T]: all texts, each followed by the end token."""
    import torch

    pieces = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return torch.cat(pieces)


def build_model(config: Training) -> Any:
    """A Llama with fp32 weights drawn from the seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=4 * config.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def optimise(model: Any, tokens: Any, config: Training, device: Any) -> list[float]:
    """AdamW with warm-up and a cosine; returns the losses of all steps.

    The sequences of a step depend on the seed and the step alone, so a resumed run sees the same text.
    """
    import torch
    from tqdm import tqdm

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    losses = load_state(model, optimizer, config)
    model.train()
    bar = tqdm(total=config.steps, initial=len(losses), desc="train", unit="step")
    with bar:
        for step in range(len(losses), config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            starts = torch.randint(len(tokens) - config.context, (config.batch_size,), generator=generator)
            batch = torch.stack([tokens[start : start + config.context] for start in starts.tolist()]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(finite(loss.item(), step))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if (step + 1) % config.save_every == 0:
                save_state(model, optimizer, losses, config)
    return losses


def learning_rate(config: Training, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def finite(loss: float, step: int) -> float:
    """The loss, or NumericalError when it is none."""
    from codegemm_kernels import NumericalError

    if not math.isfinite(loss):
        raise NumericalError(f"the loss of step {step} is {loss}: use a smaller --learning-rate")
    return loss


def state_path(config: Training) -> Path:
    """Where an unfinished run keeps its state."""
    return config.out.with_name(f"{config.out.name}.state.safetensors")


def save_state(model: Any, optimizer: Any, losses: list[float], config: Training) -> None:
    """Weights, both moments of AdamW and the losses so far; written beside and renamed."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    metadata = {"settings": json.dumps(config.settings()), "losses": json.dumps(losses)}
    path = state_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata=metadata)
    fresh.replace(path)


def load_state(model: Any, optimizer: Any, config: Training) -> list[float]:
    """Continue from a saved state, if there is one: its losses, or none. Raises BadInput when settings changed."""
    import torch
    from safetensors import safe_open

    from codegemm_kernels import BadInput

    path = state_path(config)
    if not path.exists():
        return []
    with safe_open(path, "pt") as state, torch.no_grad():
        metadata = state.metadata()
        if json.loads(metadata["settings"]) != config.settings():
            raise BadInput(f"{path} belongs to a run with other settings: delete it or give those settings")
        losses: list[float] = json.loads(metadata["losses"])
        for name, parameter in model.named_parameters():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": state.get_tensor(f"first.{name}").to(parameter.device),
                "exp_avg_sq": state.get_tensor(f"second.{name}").to(parameter.device),
            }
    say(f"continuing at step {len(losses)}")
    return losses


def write_folder(model: Any, tokenizer: Any, out: Path) -> None:
    """Model and tokenizer in one step: the folder appears when it is complete."""
    fresh = out.with_name(f"{out.name}.new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.replace(out)


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
