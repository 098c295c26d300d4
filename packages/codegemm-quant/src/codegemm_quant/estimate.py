"""What a run would make and take, from the model's config.json alone: nothing is read, nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from codegemm_kernels import CodebookScheme
from codegemm_quant.blocks import find_blocks
from codegemm_quant.config import Effort, QuantizeConfig
from codegemm_quant.fit import CODEBOOK_STEPS, SCALE_STEPS
from codegemm_quant.loading import check_source, choose_device, load_tokenizer
from codegemm_quant.model_tune import VERSIONS
from codegemm_quant.subject import TUNED_END, TUNED_WEIGHT, check_out, chosen_linears

RATE = {"cuda": 1.5e14, "cpu": 1e11}
"""Floating-point operations a second that a run reaches: bf16 and TF32 on an H200, bf16 on two CPU cores."""
PER_MATRIX = {"cuda": 0.06, "cpu": 0.5}
"""Seconds for each fit beside its products: launches on a GPU, the search of codes on a CPU."""
PER_CODE = {"cuda": 1e-9, "cpu": 4e-7}
"""Seconds for each code and round."""
STATES, COPIES = 4, 14
"""Lists of hidden states that exist at once; bytes for each weight of the block that is worked on."""


def estimate(config: QuantizeConfig) -> dict[str, Any]:
    """Sizes in bytes, bits a weight, memory and seconds of a run. Raises BadInput as the run itself would."""
    from transformers import AutoModelForCausalLM

    check_out(Path(config.out))
    check_source(config.model)
    device, scheme = choose_device(config.device), CodebookScheme.parse(config.scheme)
    effort = config.effort(device.type)
    model_config, _ = load_tokenizer(config.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    prefix, blocks = find_blocks(model)
    shapes = list(chosen_linears(config, scheme, prefix, blocks).values())
    weights = sum(n * k for n, k in shapes)
    bits = config.bits or sum(n * k * scheme.bits_per_weight(n, k) for n, k in shapes) / weights
    dense = 2 * sum(parameter.numel() for parameter in model.parameters())
    text = model_config.get_text_config()
    states = STATES * effort.samples * config.sequence_length * int(text.hidden_size) * 2
    largest = max(k for _, k in shapes)
    block = max(_weights(one) for one in blocks)
    memory = states + COPIES * block + 5 * 4 * largest**2
    if effort.model_epochs:
        ends = dense // 2 - sum(_weights(one) for one in blocks)
        memory = max(memory, (VERSIONS + 1) * states // STATES + TUNED_WEIGHT * weights + TUNED_END * ends)
    return {
        "dry_run": True,
        "matrices": len(shapes),
        "weights": weights,
        "bits_per_weight": bits,
        "bytes_dense": dense,
        "bytes_quantized": int(dense - 2 * weights + weights * bits / 8),
        "device": str(device),
        "device_memory_gb": memory / 1e9,
        "host_memory_gb": (2 * 2 * block + dense - 2 * weights) / 1e9,
        "seconds": _seconds(shapes, effort, effort.samples * config.sequence_length, scheme, device.type),
    }


def _weights(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _seconds(shapes: list[tuple[int, int]], effort: Effort, tokens: int, scheme: CodebookScheme, device: str) -> float:
    """Products of all passes at the rate above, and what the fits take beside them."""
    weights = sum(n * k for n, k in shapes)
    passes = 2 + 4 + 3 * effort.tune_epochs + 3.5 * effort.model_epochs  # statistics run half a block, four times twice
    if effort.model_epochs:
        passes += VERSIONS - 1
    forward = 2 * tokens * weights * passes
    moments = 4 * tokens * sum(k * k for _, k in shapes) / 2  # q, k, v share theirs, gate and up too
    steps = (effort.rounds + 1) * (CODEBOOK_STEPS + SCALE_STEPS + 4)
    solving = sum(2 * n * k * k for n, k in shapes) * steps
    codes = weights / scheme.vector_length * scheme.num_codebooks * (effort.rounds + 1)
    return (forward + moments + solving) / RATE[device] + len(shapes) * PER_MATRIX[device] + codes * PER_CODE[device]
