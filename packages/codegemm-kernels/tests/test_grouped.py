"""The grouped product: the same as its members one by one, on every device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegemm_kernels import ops, reference
from codegemm_kernels.errors import BadInput
from codegemm_kernels.layout import pack_codes


def matrices(count: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], ...]:
    """`count` random matrices of 8, 16, ... rows over K columns, m2v8 with groups of 32, as lists of their tensors."""
    generator = torch.Generator().manual_seed(0)
    codes, codebooks, scales, biases = [], [], [], []
    for i in range(count):
        rows = 8 * (i + 1)
        codes.append(pack_codes(torch.randint(0, 256, (rows, K // 8, 2), generator=generator)).to(device))
        codebooks.append(torch.randn(2, 256, 8, generator=generator).to(device, dtype))
        scales.append(torch.rand(K // 32, rows, generator=generator).to(device, dtype))
        biases.append(torch.randn(rows, generator=generator).to(device, dtype))
    return codes, codebooks, scales, biases


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_members(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    """Outputs of three matrices, one of them without a bias, are within the bound of a single product."""
    lists = matrices(3, 128, dtype, device)
    lists[3][1] = None  # type: ignore[call-overload]
    x = torch.randn(rows, 128, device=device).to(dtype)
    for y, *one in zip(ops.gemm_grouped(x, *lists), *lists, strict=True):
        assert y.shape == (rows, one[0].shape[2])
        assert reference.gemm_error(y, x, *one) <= {torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]


def test_grouped_is_an_op(device: torch.device) -> None:
    """torch.library's own checks: schema, fake, autograd registration."""
    lists = matrices(2, 64, torch.float32, device)
    x = torch.randn(2, 64, device=device)
    torch.library.opcheck(torch.ops.codegemm.gemm_grouped, (x, *lists))


def test_grouped_refuses_unequal_lists(device: torch.device) -> None:
    """Lists of different lengths are named."""
    codes, codebooks, scales, biases = matrices(2, 64, torch.float32, device)
    with pytest.raises(BadInput, match="one length"):
        ops.gemm_grouped(torch.randn(1, 64, device=device), codes, codebooks, scales, biases[:1])


@pytest.mark.parametrize("with_bias", [False, True])
def test_panels_of_a_gpu_prefill(monkeypatch: pytest.MonkeyPatch, device: torch.device, with_bias: bool) -> None:
    """Many rows of x times a matrix of three panels, the last one short; runs on the CPU too, with its dequantiser."""
    monkeypatch.setattr(ops, "_CUDA_PANEL_BYTES", 128 * 64 * 4)
    generator = torch.Generator().manual_seed(1)
    codes = pack_codes(torch.randint(0, 256, (300, 16, 1), generator=generator)).to(device)
    codebooks, scales = torch.randn(1, 256, 4).to(device), torch.rand(2, 300).to(device)
    bias = torch.randn(300).to(device) if with_bias else None
    x, y = torch.randn(70, 64).to(device), torch.full((70, 300), torch.nan).to(device)
    ops._gemm_by_cuda_panels(x, codes, codebooks, scales, bias, y)
    assert reference.gemm_error(y, x, codes, codebooks, scales, bias) <= 3e-6
