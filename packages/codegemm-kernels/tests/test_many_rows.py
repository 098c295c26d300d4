"""The product for many rows of x: errors, inputs that dwarf the others, threads, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from codegemm_kernels import ops, reference
from codegemm_kernels.scheme import CodebookScheme

SCHEMES = ["m1v4g128", "m2v8g128", "m1v16g-1", "m3v8g32", "m1v4g-1"]


def operands(scheme_text: str, N: int, K: int, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    scheme, random = CodebookScheme.parse(scheme_text), torch.Generator().manual_seed(rows)
    shapes = scheme.shapes(N, K)
    codes = torch.randint(-(2**31), 2**31, shapes["codes"], generator=random).int()
    codebooks = torch.randn(shapes["codebooks"], generator=random).to(dtype)
    scales = (0.02 * torch.rand(shapes["scales"], generator=random)).to(dtype)
    x = torch.randn((rows, K), generator=random).to(dtype)
    return [x, codes, codebooks, scales]


def row_errors(y: torch.Tensor, x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    codes, codebooks, scales = weight
    exact = reference.gemm(x.double(), codes, codebooks.double(), scales.double())
    errors: torch.Tensor = (y.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [48, 263])
def test_every_row_agrees_with_float64(scheme: str, rows: int, dtype: torch.dtype) -> None:
    x, *weight = operands(scheme, 200, 512, rows, dtype)
    errors = row_errors(ops.gemm(x, *weight), x, *weight)
    # Rounding y to bf16 alone is 1.66e-3 on average, and more in one row of 200.
    assert errors.max() < (2.5e-3 if dtype == torch.bfloat16 else 6e-4)
    assert errors.mean() < 2e-3


@pytest.mark.parametrize("size", [700, 4096])
def test_a_huge_input_does_not_drown_those_beside_it(size: int) -> None:
    """Row 3 has one input far larger than the others; without that input's part of y the others' must be right."""
    x, codes, codebooks, scales = operands("m1v4g128", 200, 512, 64, torch.float16)
    x[3, 5] = size
    codebooks[:, :, 5 % 4] = 0  # of the elements that the huge input meets
    assert row_errors(ops.gemm(x, codes, codebooks, scales), x, codes, codebooks, scales).max() < 2e-3


@pytest.mark.parametrize("size", [1e-17, 1e19])
def test_entries_near_the_ends_of_bfloat16(size: float) -> None:
    x, codes, codebooks, scales = operands("m2v8g128", 200, 512, 64, torch.bfloat16)
    weight = codes, codebooks * size, scales / size
    assert row_errors(ops.gemm(x, *weight), x, *weight).max() < 2.5e-3


def test_threads_and_the_order_of_codes_change_nothing() -> None:
    x, codes, codebooks, scales = operands("m2v8g128", 300, 512, 100, torch.bfloat16)
    tiled = ops.tile(codes, 8, scales.shape[0])
    before, ys = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ys += [ops.gemm(x, codes, codebooks, scales), ops.gemm(x, tiled, codebooks, scales)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, *weight = operands("m1v4g128", 100, 256, 50, torch.bfloat16)
    clean = ops.gemm(x, *weight)
    x[7, 9] = value
    y = ops.gemm(x, *weight)
    assert not y[7].isfinite().any()
    y[7] = clean[7]
    assert torch.equal(y, clean)
