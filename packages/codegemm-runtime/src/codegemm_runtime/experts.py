"""Mixtures of experts: transformers keeps the experts' weights in two 3-D parameters, our checkpoints one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

PARTS = ("gate_up_proj", "down_proj")


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


def unfuse_experts(model: nn.Module, stored: Iterable[str]) -> list[str]:
    """Take apart every fused experts module of which `stored`, names of tensors, holds the experts one by one.

    The new linears are uninitialised, on the device and in the dtype of the fused parameters: they are about to be
    loaded or replaced. Returns the names of the modules taken apart.
    """
    pattern = re.compile(rf"(?:^|\.)([^.]+)\.\d+\.(?:{'|'.join(PARTS)})\.")
    # Stored names may be others than the model's, before transformers renames them; the last part of a name stays.
    last = {match[1] for name in stored for match in pattern.finditer(name)}
    found = []
    for name, module in list(model.named_modules()):
        fused = [getattr(module, part, None) for part in PARTS]
        three = all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in fused)
        if three and name.rpartition(".")[2] in last:
            model.set_submodule(name, Experts(_experts(module)))
            found.append(name)
    return found


def _experts(module: nn.Module) -> list[Expert]:
    parameters: list[Tensor] = [getattr(module, part) for part in PARTS]
    act_fn: Callable[[Tensor], Tensor] = module.act_fn  # type: ignore[assignment]
    experts = []
    for _ in range(len(parameters[0])):
        linears = [
            nn.Linear(p.shape[2], p.shape[1], bias=False, device=p.device, dtype=p.dtype).requires_grad_(False)
            for p in parameters
        ]
        experts.append(Expert(linears[0], linears[1], act_fn))
    return experts
