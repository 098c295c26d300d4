"""Whether a GPU multiplies some rows of x by the kernels or by dequantised panels of W: measured, docs/log.md."""

from __future__ import annotations

import torch
from torch import Tensor

# Most tensor-core kernels take up to 64 rows at a time, and two such rounds cost less than panels; fp32 has none.
# Hopper's (csrc/cuda/codebook_wgmma.cuh) takes any number, and up to here panels are no faster.
_MAX_ROWS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 8}
_MAX_HOPPER_ROWS = 1024


def suits_cuda_kernels(rows: Tensor, codes: Tensor, codebooks: Tensor) -> bool:
    """Whether the kernels are the faster way for rows [M, K] on a GPU and a matrix of these codes."""
    if rows.shape[0] <= _MAX_ROWS.get(rows.dtype, 0):
        return True
    m, _, v = codebooks.shape
    hopper = rows.dtype in (torch.float16, torch.bfloat16) and m <= 2 and v <= 8 and codes.shape[2] % 8 == 0
    hopper = hopper and rows.shape[0] <= _MAX_HOPPER_ROWS and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return hopper and torch.cuda.get_device_capability(rows.device) == (9, 0)
