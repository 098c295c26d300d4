"""Models for bench_decode.py: Llama shapes with random weights made on the device, or a checkpoint folder."""

from __future__ import annotations

from typing import Any

import torch

LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    """What differs between the sizes of Llama 3."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA_ROPE,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama-3.2-1b": llama(2048, 8192, 16, 32, tied=True),
    "llama-3.1-8b": llama(4096, 14336, 32, 32),
    "llama-3.1-70b": llama(8192, 28672, 80, 64),
}


def build(shape: str, backend: str, scheme: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The model to time, its random weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from codegemm_kernels import CodebookScheme
    from codegemm_runtime import load_model, replace_linears
    from codegemm_runtime.replace import restore_linears

    if shape not in SHAPES:
        model = load_model(shape, device, dtype)
        if backend == "dense":
            restore_linears(model)
        return model
    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    linears = [f"model.{name}" for name, each in model.model.named_modules() if isinstance(each, torch.nn.Linear)]
    if backend.startswith("aqlm"):
        replace_by_aqlm(model, linears, backend)
    elif backend != "dense":
        replace_linears(model, dict.fromkeys(linears, CodebookScheme.parse(scheme)))
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are in no checkpoint
    for key, parameter in model.named_parameters():
        fill(key, parameter.data)
    return model.requires_grad_(False)


def fill(name: str, data: torch.Tensor) -> None:
    """Random weights of a size that keeps activations finite."""
    if not data.is_floating_point():
        data.view(torch.int8).random_(-128, 128)
    elif "norm" in name:
        data.fill_(1)
    elif name.endswith("scales"):
        data.fill_(0.02)
    else:
        data.normal_(std=1 if name.endswith("codebooks") else 0.02)


def replace_by_aqlm(model: Any, names: list[str], backend: str) -> None:
    """Swap in the layers of the aqlm package; BadInput where it is not installed."""
    from codegemm_kernels.errors import BadInput

    try:
        from aqlm import QuantizedLinear
    except ImportError as error:
        raise BadInput(f"{backend} needs the package aqlm[gpu] ({error}): install it, or leave it out") from error
    num_codebooks, bits = (2, 8) if backend == "aqlm-2x8" else (1, 16)
    for name in names:
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = QuantizedLinear(
                old.in_features, old.out_features, 8, 1, num_codebooks, bits, bias=False, dtype=old.weight.dtype
            )
        model.set_submodule(name, new)
