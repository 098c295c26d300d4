"""Models of published shapes with random weights made on the device, for measuring without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codegemm_runtime.linear import tile_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
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
        "rope_parameters": _ROPE,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
}
"""Arguments of LlamaConfig by name."""


def random_model(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    replace: Callable[[PreTrainedModel, list[str]], object] = lambda model, names: None,
) -> PreTrainedModel:
    """A model of one of `SHAPES`; `replace` may swap the linears of its layers, by name, while they are on meta."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    replace(model, [f"model.{name}" for name, each in model.model.named_modules() if isinstance(each, nn.Linear)])
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are in no checkpoint
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data)
    tile_linears(model)
    random: PreTrainedModel = model.requires_grad_(False)
    return random


def _fill(name: str, data: Tensor) -> None:
    """Random weights of a size that keeps activations finite."""
    if not data.is_floating_point():
        data.view(torch.int8).random_(-128, 128)
    elif "norm" in name:
        data.fill_(1)
    elif name.endswith("scales"):
        data.fill_(0.02)
    else:
        data.normal_(std=1 if name.endswith("codebooks") else 0.02)
