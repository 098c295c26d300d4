"""Adam in steps relative to the size of each parameter, on all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTUM, MEMORY = 0.9, 0.95
EPSILON = 1e-12
"""Small: gradients of codebooks are sums over thousands of weights, those of norms are not."""


class RelativeAdam:
    """Adam under a cosine schedule; the largest step of a parameter is `rate` times its root mean square.

    A step is about twenty launches however many parameters there are, and all its state is on the device, so that it
    can be recorded in a CUDA graph (torch.optim.Adam has one learning rate a group, which is one launch a parameter).
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, steps: int) -> None:
        self._parameters = list(parameters)
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]
        self._rates = [rate * max(float(p.detach().square().mean().sqrt()), 1e-4) for p in parameters]
        self._taken = torch.zeros((), device=parameters[0].device)
        self._steps = max(1, steps)

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """One step down the gradients, one for each parameter."""
        now = 0.5 * (1 + torch.cos(self._taken * (math.pi / self._steps)))
        self._taken += 1
        now = now * (1 - MEMORY**self._taken).sqrt() / (1 - MOMENTUM**self._taken)
        torch._foreach_lerp_(self._first, gradients, 1 - MOMENTUM)
        torch._foreach_mul_(self._second, MEMORY)
        torch._foreach_addcmul_(self._second, gradients, gradients, 1 - MEMORY)
        sizes = torch._foreach_sqrt(self._second)
        torch._foreach_add_(sizes, EPSILON)
        changes = torch._foreach_div(self._first, sizes)
        torch._foreach_mul_(changes, self._rates)
        torch._foreach_mul_(changes, now)
        torch._foreach_sub_(self._parameters, changes)
