"""Mixtures of experts: transformers keeps the experts' weights in two 3-D parameters; here each is a linear again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated feed-forward network: `down_proj(act(gate) * up)`, gate and up being halves of `gate_up_proj`."""

    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.act_fn(gate) * up)
        return out


class Experts(nn.ModuleList):
    """What stands in the place of a fused experts module, called as that one is."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; for each token the numbers and weights of its experts, [tokens, k]."""
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number < len(self):  # numbers beyond the last expert stand for none
                token, place = torch.where(top_k_index == number)
                output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


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
