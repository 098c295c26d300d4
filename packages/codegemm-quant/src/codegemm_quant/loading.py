"""The dense model to compress, checked before a weight is used, and where and in what dtype it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codegemm_kernels import BadInput
from codegemm_kernels.checkpoint import checkpoint_files, read_config, read_headers


def choose_device(name: str | None) -> torch.device:
    """The named device, or the first GPU, or else the CPU. Raises BadInput when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def load_dense(name: str) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the CPU, in its own dtype) and tokenizer of a folder or hub name.

    Raises BadInput for what is no dense causal language model, or lacks or garbles a tensor: transformers itself
    would warn and go on with random weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name)
    if folder.is_dir():
        if "quantization_config" in read_config(folder):
            raise BadInput(f"{name} is quantised already: give the dense model")
        read_headers(checkpoint_files(folder))
    elif folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise BadInput(f"there is no folder {name}: give a model folder or a hub name such as owner/name")
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{name} cannot be loaded as a causal language model: {reason}") from error
    if missing := sorted(told["missing_keys"]):
        raise BadInput(f"{name} lacks {len(missing)} of the model's tensors: {missing[0]}; get the model again")
    for tensor, stored, wanted in sorted(told["mismatched_keys"]):
        raise BadInput(
            f"{name}: {tensor} has shape {list(stored)}, but config.json makes it {list(wanted)}; get the model again"
        )
    for tensor, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"{name}: {tensor} holds values that are not finite (NaN or inf); get the model again")
    return model.eval(), tokenizer
