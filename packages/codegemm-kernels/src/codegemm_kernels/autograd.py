"""The product with gradients, apart from the op: an autograd formula on the op would double the cost of every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codegemm_kernels import ops
from codegemm_kernels.layout import unpack_codes

_Gradients = tuple[Tensor | None, None, Tensor | None, Tensor | None, Tensor | None]


def gemm_with_grad(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`codegemm::gemm`, differentiable once in x, codebooks, scales and bias.

    Shapes, dtypes and errors are those of the op. The gradient of x is one product with the dequantised weight; those
    of codebooks and scales are summed in fp32. Backward holds one dequantised matrix, and for codebooks and scales two
    in fp32.
    """
    result: Tensor = _Gemm.apply(x, codes, codebooks, scales, bias)
    return result


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, codes, codebooks, scales)
        y: Tensor = ops.gemm(x, codes, codebooks, scales, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Gradients:
        (grad,) = grads
        x, codes, codebooks, scales = ctx.saved_tensors
        need_x, _, need_codebooks, need_scales, need_bias = ctx.needs_input_grad
        grad_x = grad_codebooks = grad_scales = grad_bias = None
        if need_x:
            grad_x = grad @ ops.dequantize(codes, codebooks, scales)
        rows = grad.reshape(-1, grad.shape[-1]).float()
        if need_codebooks or need_scales:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]).float()
            grad_codebooks, grad_scales = _weight_gradients(
                grad_weight, codes, codebooks, scales, need_codebooks, need_scales
            )
        if need_bias:
            grad_bias = rows.sum(0).to(grad.dtype)
        return grad_x, None, grad_codebooks, grad_scales, grad_bias


def _weight_gradients(
    grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, need_codebooks: bool, need_scales: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From dL/dW, fp32 [N, K], to dL/dcodebooks [m, 256, v] and dL/dscales [G, N], each in its parameter's dtype."""
    num_codebooks, entries, vector_length = codebooks.shape
    num_groups, rows = scales.shape
    grouped = grad_weight.reshape(rows, num_groups, -1)
    grad_codebooks = grad_scales = None
    if need_scales:
        unscaled = ops.dequantize(codes, codebooks.float(), torch.ones_like(scales, dtype=torch.float32))
        grad_scales = (grouped * unscaled.reshape_as(grouped)).sum(-1).t().to(scales.dtype)
    if need_codebooks:
        vectors = (grouped * scales.float().t().unsqueeze(-1)).reshape(-1, vector_length)
        indices = unpack_codes(codes).reshape(-1, num_codebooks).long()
        # index_put_ and not index_add_: on CUDA it sorts instead of using atomics, so two runs agree to the bit.
        sums = [
            vectors.new_zeros(entries, vector_length).index_put_((indices[:, i],), vectors, accumulate=True)
            for i in range(num_codebooks)
        ]
        grad_codebooks = torch.stack(sums).to(codebooks.dtype)
    return grad_codebooks, grad_scales
