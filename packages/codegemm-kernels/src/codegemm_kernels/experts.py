"""A mixture's experts one by one, as checkpoints hold them; transformers fuses their weights in two 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated feed-forward network: `down_proj(act(gate) * up)`, gate and up being halves of `gate_up_proj`."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, act_fn: Callable[[Tensor], Tensor]) -> None:
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
    """In the place of a fused experts module, and called as that one is; the router stays the model's own."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; for each token the numbers and weights of its experts, [tokens, k]."""
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number < len(self):  # numbers beyond the last expert stand for none
                token, place = torch.where(top_k_index == number)
                output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total
