"""The dense model to compress, checked before a weight is used, and where and in what dtype it is run."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels import BadInput
from codegemm_kernels.checkpoint import checkpoint_files, read_config, read_headers

STRIDE, SAMPLE = 1 << 16, 256
"""Of every 64 KB of a model's files so many bytes go into its fingerprint."""


def choose_device(name: str | None) -> torch.device:
    """The named device, or this process's GPU, or else the CPU. Raises BadInput when it is not there."""
    if name is None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"unknown device {name!r}: use cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def compute_dtype(model: torch.dtype, device: torch.device) -> torch.dtype:
    """What blocks are run in: the model's dtype, or bf16 for fp32 models on a GPU; fp32 on a CPU without bf16 units."""
    if device.type == "cuda":
        return torch.bfloat16 if model == torch.float32 else model
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and model == torch.bfloat16 else torch.float32


def check_source(name: str) -> None:
    """Raise BadInput for what is no dense model's folder or hub name, as far as can be told without reading it."""
    folder = Path(name)
    if folder.is_dir():
        if "quantization_config" in read_config(folder):
            raise BadInput(f"{name} is quantised already: give the dense model")
        read_headers(checkpoint_files(folder))
    elif folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise BadInput(
            f"there is no folder {name}: give a model folder or a hub name with its owner (openai-community/gpt2)"
        )


def load_tokenizer(name: str) -> tuple[Any, Any]:
    """Config and tokenizer of a folder or hub name, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(name, error) from error


def load_dense(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name, checked as in `check_source`, `load_model` and `load_tokenizer`."""
    check_source(name)
    return load_model(name), load_tokenizer(name)[1]


def load_model(name: str) -> Any:
    """The model of a folder or hub name, in evaluation mode, on the CPU and in its own dtype.

    Its weights are mapped from the safetensors files, not read: a block occupies memory while it is worked on. (Only
    where transformers has to rearrange stored tensors, as those of experts, are they copied.) Raises BadInput for
    what is no causal language model, or lacks or garbles a tensor: transformers itself would warn and go on with
    random weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(name, error) from error
    if missing := sorted(told["missing_keys"]):
        raise BadInput(f"{name} lacks {len(missing)} of the model's tensors: {missing[0]}; get the model again")
    for tensor, stored, wanted in sorted(told["mismatched_keys"]):
        raise BadInput(
            f"{name}: {tensor} has shape {list(stored)}, but config.json makes it {list(wanted)}; get the model again"
        )
    for tensor, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"{name}: {tensor} holds values that are not finite (NaN or inf); get the model again")
    return model.eval()


def fingerprint(name: str, config: Any) -> str:
    """Tells one state of a model from another: the headers of its files and a sample of their bytes.

    A model on the hub is told by its commit.
    """
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    digest = sha256((folder / "config.json").read_bytes())
    for file in checkpoint_files(folder):
        with file.open("rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for at in range(stream.tell(), file.stat().st_size, STRIDE):
                stream.seek(at)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def _unreadable(name: str, error: Exception) -> BadInput:
    return BadInput(f"{name} cannot be loaded as a causal language model: {str(error).strip().splitlines()[0]}")
