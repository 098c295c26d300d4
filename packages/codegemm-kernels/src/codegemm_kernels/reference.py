"""The arithmetic in plain torch: the definition, the fallback on any device, and the oracle of every kernel test."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_kernels.checks import check_input, check_weight
from codegemm_kernels.layout import unpack_codes


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Rebuild the weight [N, K], in the dtype of `codebooks`, with the sum and the scaling in at least fp32.

    codes int32 [m, K/(4v), N], codebooks float [m, 256, v], scales float [G, N] (CodeGEMM, NeurIPS 2025, section 3).
    """
    exact = torch.promote_types(codebooks.dtype, torch.float32)
    indices = unpack_codes(codes).long()
    rows, vectors, num_codebooks = indices.shape
    vector_length, num_groups = codebooks.shape[2], scales.shape[0]
    weight = torch.zeros(rows, vectors, vector_length, dtype=exact, device=codes.device)
    for i in range(num_codebooks):
        weight += codebooks[i].to(exact)[indices[:, :, i]]
    group = vectors * vector_length // num_groups  # not -1, which means nothing where there are no rows
    grouped = weight.reshape(rows, num_groups, group) * scales.to(exact).t().unsqueeze(-1)
    return grouped.reshape(rows, vectors * vector_length).to(codebooks.dtype)


def gemm(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ dequantize(...).T + bias` for x [..., K], in x's dtype, accumulated in at least fp32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(codes, codebooks.to(exact), scales.to(exact))
    y = x.to(exact) @ weight.t()
    if bias is not None:
        y = y + bias.to(exact)
    return y.to(x.dtype)


def checked_dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """`dequantize` with the refusals of the kernels: the op where there is none."""
    check_weight(codes, codebooks, scales)
    return dequantize(codes, codebooks, scales)


def checked_gemm(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gemm` with the refusals of the kernels: the op where there is none."""
    N, K, _ = check_weight(codes, codebooks, scales)
    check_input(x, bias, codes, codebooks, N, K)
    return gemm(x, codes, codebooks, scales, bias)


def gemm_error(
    y: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None
) -> float:
    """Largest |y - exact| / (sum |w||x| + |bias|) over all outputs, with `exact` computed in float64.

    |w| is the scale times the sum of the codebooks' |entries|: what a kernel rounds are entries or their products. This
    is the error every kernel bound is stated in: it does not blow up where an output, or a weight, happens to cancel.
    """
    wide = [t.double() for t in (x, codebooks, scales)]
    weight = dequantize(codes, wide[1], wide[2])
    exact = wide[0] @ weight.t()
    size = wide[0].abs() @ dequantize(codes, wide[1].abs(), wide[2].abs()).t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    error = (y.double() - exact).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.max()) if error.numel() else 0.0
