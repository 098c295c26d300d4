"""Fused experts of a model that is about to be loaded, taken apart so that each can hold codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from codegemm_kernels.experts import Expert, Experts

PARTS = ("gate_up_proj", "down_proj")


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
