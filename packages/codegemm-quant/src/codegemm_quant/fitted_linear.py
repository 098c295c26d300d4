"""A linear whose weight is made of codes, inside a block that is being tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from codegemm_kernels import unpack_codes
from codegemm_quant.weight import CodebookWeight, EntrySums


class FittedLinear(nn.Module):
    """Codes as a uint8 buffer, codebooks [m, 256, v] and scales [N, G] as fp32 parameters, the dense weight on demand.

    `refresh` rebuilds the dense weight in the compute dtype, once an optimiser step; `collect_gradients` sends the
    gradient that a backward pass has left on it back into codebooks and scales, where those of several passes add up
    in fp32. Between the two no graph is kept: a layer holds its codes, its dense weight and that weight's gradient.
    """

    codes: Tensor
    dense: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: CodebookWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes.to(torch.uint8))
        self.codebooks = nn.Parameter(weight.codebooks.detach().clone())
        self.scales = nn.Parameter(weight.scales.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.dtype = dtype
        self._sums: EntrySums | None = None
        self.refresh(training=False)

    @property
    def weight(self) -> CodebookWeight:
        """The weight as it is now; codebooks and scales are shared with it."""
        return CodebookWeight(self.codes.int(), self.codebooks.detach(), self.scales.detach())

    @classmethod
    def from_packed(cls, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> FittedLinear:
        """From the stored tensors `codes`, `codebooks`, `scales` and perhaps `bias`."""
        weight = CodebookWeight(
            unpack_codes(tensors["codes"]).long().to(device),
            tensors["codebooks"].float().to(device),
            tensors["scales"].float().t().contiguous().to(device),
        )
        bias = tensors.get("bias")
        return cls(weight, None if bias is None else bias.to(device), dtype)

    def packed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors, on the CPU."""
        tensors = self.weight.packed(dtype)
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().to(dtype).cpu()
        return tensors

    @torch.no_grad()
    def refresh(self, *, training: bool) -> None:
        """Rebuild the dense weight from codes, codebooks and scales."""
        self.dense = self.weight.dequantize().to(self.dtype)
        self.dense.requires_grad_(training)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Turn the gradient of the dense weight into gradients of codebooks and scales, and drop it.

        dL/dB_i[e] sums s * G over the vectors whose code is e, dL/ds sums G * (sum of entries) over the group.
        """
        if self.dense.grad is None:
            return
        gradient, weight = self.dense.grad.float(), self.weight
        self.dense.grad = None
        rows, groups = self.scales.shape
        if self._sums is None:
            self._sums = EntrySums(self.codes)
        scales = (gradient * weight.unscaled()).view(rows, groups, -1).sum(-1)
        codebooks = self._sums(gradient.view(rows, groups, -1) * self.scales.unsqueeze(-1))
        for parameter, value in ((self.scales, scales), (self.codebooks, codebooks)):
            parameter.grad = value if parameter.grad is None else parameter.grad + value

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the compute dtype."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return functional.linear(x.to(self.dtype), self.dense, bias)
