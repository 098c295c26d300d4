"""Mixtures of experts: transformers keeps the experts' weights in two 3-D parameters; here each is a linear again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codegemm_kernels.experts import Expert, Experts


def is_fused(module: nn.Module) -> bool:
    """Whether this is an experts module that `unfuse_experts` knows how to take apart."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def unfuse_experts(block: nn.Module) -> None:
    """Give every fused experts module of a block the shape of ordinary linears; weights are shared, not copied."""
    for name, module in list(block.named_modules()):
        if is_fused(module):
            pairs = zip(module.gate_up_proj, module.down_proj, strict=True)
            experts = [Expert(_linear(up), _linear(down), module.act_fn) for up, down in pairs]
            block.set_submodule(name, Experts(experts))


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
