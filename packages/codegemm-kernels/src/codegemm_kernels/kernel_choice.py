"""Which kernels a GPU has for a matrix, and when it multiplies by dequantised panels instead: measured, docs/log.md."""

from __future__ import annotations

import torch
from torch import Tensor

# Most tensor-core kernels take up to 64 rows at a time, and two such rounds cost less than panels; fp32 has none.
# Hopper's (csrc/cuda/codebook_wgmma.cuh) takes any number, and panels are never faster.
_MAX_ROWS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 8}


def suits_cuda_kernels(rows: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether the kernels are the faster way for rows [M, K] on a GPU and a matrix of codes, codebooks and scales."""
    if rows.shape[0] <= _MAX_ROWS.get(rows.dtype, 0):
        return True
    hopper = fits_hopper_kernel(rows, codes, codebooks, scales)
    return hopper and torch.cuda.get_device_capability(rows.device) == (9, 0)


def fits_hopper_kernel(rows: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether codebook_wgmma can compute the product: `fits_wgmma` of its headers, with places as `is_fast` asks."""
    (m, _, v), (_, words, N), groups = codebooks.shape, codes.shape, scales.shape[0]
    if m > 2 or v > 8 or why_general(rows.dtype, N, words, groups) is not None:
        return False
    halves = v > 4 or groups == 1 or words // groups % 2 == 0  # half a stage, two words of v = 4, has one scale a row
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (rows, codes, codebooks, scales))
    return halves and rows.stride(0) % 8 == 0 and aligned


def why_general(dtype: torch.dtype, out_features: int, words: int, groups: int) -> str | None:
    """What of a matrix leaves it to the general kernel, many times slower; None for nothing: `is_fast` of gemm.cu.

    `words` and `groups` are code words and scale groups of a row.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    if out_features % 8:
        return "the number of rows is no multiple of 8"
    if groups < 1 or words % groups:
        return "a scale group is no whole number of code words"
    return None if words < 65536 else "a row has 65536 code words or more"
