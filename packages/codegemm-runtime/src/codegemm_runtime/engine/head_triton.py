"""The int8 head's product for a few rows, in Triton: the codes are read once and nothing else is large."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegemm_runtime.engine.fused_triton import launch_options

BLOCK_N, BLOCK_K = 64, 256


@triton.jit  # type: ignore[untyped-decorator]
def _int8_product(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, y_ptr, rows, N, K,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (n < N)[:, None] & (k < K)[None, :]
        codes = tl.load(codes_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=there, other=0)
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=(row < rows)[None, :] & (k < K)[:, None], other=0.0)
        sums += tl.dot(codes.to(x.dtype), x, input_precision="ieee")
    sums *= tl.load(scales_ptr + n, mask=n < N, other=0.0)[:, None]
    at = row[None, :] * N + n[:, None]
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (row < rows)[None, :])


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [rows, K] times codes int8 [N, K] scaled by row, [rows, N] in the dtype of x."""
    rows, (N, K) = x.shape[0], codes.shape
    y = x.new_empty((rows, N))
    _int8_product[(triton.cdiv(N, BLOCK_N),)](
        x.contiguous(),
        codes,
        scales,
        y,
        rows,
        N,
        K,
        ROWS=max(triton.next_power_of_2(rows), 16),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=4,
        **launch_options(x.device),
    )
    return y
