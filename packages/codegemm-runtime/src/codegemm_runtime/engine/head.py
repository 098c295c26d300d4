"""The head as int8 with one scale a row: half the bytes of fp16, a twelfth of the time of a step at 8B and 2 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codegemm_runtime.engine.decoder import Product, Unsupported

ROWS = 4096
"""Rows that plain torch converts back at a time."""


class Int8Head:
    """Stands in for the `Product` of a head: `codes` int8 [vocabulary, hidden], `scales` fp32 [vocabulary]."""

    def __init__(self, head: Any) -> None:
        """Raises Unsupported for a head that is no dense layer."""
        if not isinstance(head, Product) or not isinstance(head.linears[0], nn.Linear):
            raise Unsupported("has a head that is stored as codes already")
        linear = head.linears[0]
        weight: Tensor = linear.weight.detach()
        self.bias = linear.bias
        self.codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(weight.shape[0], device=weight.device)
        for start in range(0, weight.shape[0], ROWS):
            part = weight[start : start + ROWS].float()
            scale = (part.abs().amax(dim=1) / 127).clamp_min(1e-12)
            self.codes[start : start + ROWS] = (part / scale[:, None]).round().to(torch.int8)
            self.scales[start : start + ROWS] = scale

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [rows, hidden] to [[rows, vocabulary]]."""
        if x.is_cuda and x.shape[0] <= 32:
            from codegemm_runtime.engine.head_triton import int8_product

            y = int8_product(x, self.codes, self.scales)
        else:
            parts = zip(self.codes.split(ROWS), self.scales.split(ROWS), strict=True)
            y = torch.cat([(x @ codes.to(x.dtype).T) * scales for codes, scales in parts], dim=1).to(x.dtype)
        return [y if self.bias is None else y + self.bias]
