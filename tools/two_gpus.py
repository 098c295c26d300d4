"""One model on one GPU, its layers divided over two, and two processes with half of every layer each: the same tokens?

Compared are greedy tokens and the logits after the prompt, in every dtype that the kernels have. On a CPU
(`--device cpu`) the two processes alone are compared.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from codegemm_kernels.errors import BadInput, NumericalError, run_command

PROMPT = "import unittest\n\n\nclass TestList(unittest.TestCase):\n    def test_"
LARGEST_ERROR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Of the logits, relative to those of one GPU: a half-precision sum over two parts is rounded once more."""


@dataclass(frozen=True)
class TwoGpus:
    """What to compare."""

    models: tuple[Path, ...]
    """Folders of quantised checkpoints with their tokenizers."""
    json: Path | None = None
    """File for the figures."""
    dtypes: tuple[str, ...] = tuple(LARGEST_ERROR)
    """Dtypes to load them in."""
    new_tokens: int = 32
    """Greedy tokens to generate."""
    device: str = "cuda"
    """cuda, or cpu to try the two processes without GPUs."""
    debug: bool = False
    """Show the traceback of a failure."""


@dataclass(frozen=True)
class Answer:
    """What a model makes of the prompt."""

    tokens: list[int]
    logits: torch.Tensor
    """[vocabulary], in fp32 on the CPU."""

    def against(self, one: Answer) -> dict[str, Any]:
        """How it differs from that of one GPU."""
        error = (self.logits - one.logits).norm() / one.logits.norm()
        return {"same_tokens": self.tokens == one.tokens, "logit_error": float(error)}


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(TwoGpus, description=__doc__)
    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: TwoGpus) -> dict[str, Any]:
    """All comparisons. Raises NumericalError for other tokens in fp32 or logits too far away; BadInput without GPUs."""
    if config.device == "cuda" and torch.cuda.device_count() < 2:
        raise BadInput(
            f"two GPUs are needed, and torch sees {torch.cuda.device_count()}: --device cpu tries it without"
        )
    rows = list(compare(config))
    result = {"device": name_of(config.device), "torch": torch.__version__, "tokens": config.new_tokens, "rows": rows}
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        if row["logit_error"] > LARGEST_ERROR[row["dtype"]] or (row["dtype"] == "float32" and not row["same_tokens"]):
            raise NumericalError(f"{row['way']} differs from one GPU: {row}")
    return result


def compare(config: TwoGpus) -> Iterator[dict[str, Any]]:
    """Rows of the result. The processes of all models run before any model is loaded here."""
    from transformers import AutoModelForCausalLM

    from codegemm_runtime import load_model

    shares = tensor_parallel(config)
    for folder, dtype in jobs(config):
        row = {"model": folder.name, "dtype": dtype}
        model = load_model(folder, config.device, dtype)
        one = ask(config, folder, model)
        if config.device == "cuda":
            parts = halves(model)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=parts)
            devices = sorted({str(parameter.device) for parameter in model.parameters()})
            yield row | {"way": "half of the layers each", "devices": devices} | ask(config, folder, model).against(one)
        for rank, found in enumerate(shares):
            answer, nbytes = found[str(folder), dtype]
            way = f"half of every layer, process {rank}"
            yield row | {"way": way, "layer_bytes": nbytes} | answer.against(one)


def jobs(config: TwoGpus) -> Iterator[tuple[Path, str]]:
    """Every folder in every dtype."""
    return ((folder, dtype) for folder in config.models for dtype in config.dtypes)


def halves(model: Any) -> dict[str, int]:
    """A device map: first half of the layers with the embedding on GPU 0, the rest on GPU 1."""
    count = model.config.num_hidden_layers
    layers = {f"model.layers.{i}": int(2 * i >= count) for i in range(count)}
    head = 0 if model.config.tie_word_embeddings else 1
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, **layers, "model.norm": 1, "lm_head": head}


def ask(config: TwoGpus, folder: Path, model: Any) -> Answer:
    """Greedy tokens, and logits after the prompt."""
    from codegemm_runtime import load_tokenizer

    ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids.to(model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        tokens = model.generate(ids, max_new_tokens=config.new_tokens, **options)[0, ids.shape[1] :].tolist()
        return Answer(tokens, model(ids).logits[0, -1].float().cpu())


def tensor_parallel(config: TwoGpus) -> list[dict[tuple[str, str], tuple[Answer, int]]]:
    """For each of two processes its answers, and the bytes of its layers, by folder and dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(share, (config, scratch), nprocs=2)
        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def share(rank: int, config: TwoGpus, scratch: str) -> None:
    """One of the two processes; leaves its answers in `scratch`."""
    from codegemm_runtime.tensor_parallel import load_tensor_parallel

    os.environ["LOCAL_RANK"] = str(rank)
    device, backend = (f"cuda:{rank}", "nccl") if config.device == "cuda" else ("cpu", "gloo")
    if config.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{scratch}/store", rank=rank, world_size=2)
    found = {}
    for folder, dtype in jobs(config):
        model = load_tensor_parallel(folder, device, dtype)
        nbytes = sum(each.nbytes for name, each in model.named_parameters() if ".layers." in name)
        found[str(folder), dtype] = ask(config, folder, model), nbytes
    torch.save(found, Path(scratch) / f"{rank}.pt")
    dist.destroy_process_group()


def name_of(device: str) -> str:
    """The machine as the result names it."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device == "cuda" else device


if __name__ == "__main__":
    main()
