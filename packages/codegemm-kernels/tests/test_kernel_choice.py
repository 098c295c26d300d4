"""Which products Hopper's kernel can compute: the choice is made in Python, so it is tested without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegemm_kernels.kernel_choice import fits_hopper_kernel, suits_cuda_kernels, why_general
from codegemm_kernels.scheme import CodebookScheme


def operands(scheme_text: str, N: int = 64, K: int = 768, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    scheme = CodebookScheme.parse(scheme_text)
    shapes = scheme.shapes(N, K)
    x, codes = torch.zeros(300, K, dtype=dtype), torch.zeros(shapes["codes"], dtype=torch.int32)
    return [x, codes, torch.zeros(shapes["codebooks"], dtype=dtype), torch.zeros(shapes["scales"], dtype=dtype)]


@pytest.mark.parametrize("scheme", ["m1v4g128", "m2v8g128", "m1v8g32", "m1v4g-1", "m2v4g96"])
def test_what_it_takes(scheme: str) -> None:
    assert fits_hopper_kernel(*operands(scheme))


@pytest.mark.parametrize(
    "scheme",
    ["m3v8g128", "m1v16g128", "m1v8g16", "m1v4g16", "m1v4g48"],  # codebooks, vectors, then groups of half a stage
)
def test_schemes_it_does_not_take(scheme: str) -> None:
    assert not fits_hopper_kernel(*operands(scheme))


def test_shapes_and_places_it_does_not_take() -> None:
    assert not fits_hopper_kernel(*operands("m1v4g128", N=60))
    assert not fits_hopper_kernel(*operands("m1v4g128", dtype=torch.float32))
    x, codes, codebooks, scales = operands("m1v4g128")
    assert not fits_hopper_kernel(
        torch.zeros(300 * 769 + 1, dtype=x.dtype)[:-1].view(300, 769)[:, :768], *operands("m1v4g128")[1:]
    )
    assert not fits_hopper_kernel(
        torch.zeros(300 * 768 + 1, dtype=x.dtype)[1:].view(300, 768), codes, codebooks, scales
    )
    assert not fits_hopper_kernel(x, codes, codebooks, scales[:0])


def test_few_rows_always_go_to_kernels() -> None:
    x, *weight = operands("m3v8g128")
    assert suits_cuda_kernels(x[:128], *weight)
    assert not suits_cuda_kernels(x[:129], *weight)
    assert not suits_cuda_kernels(x[:9].float(), *weight)


@pytest.mark.parametrize(
    ("dtype", "N", "words", "groups", "reason"),
    [
        (torch.float16, 4096, 256, 32, None),
        (torch.bfloat16, 8, 1, 1, None),
        (torch.float32, 4096, 256, 32, "float32"),
        (torch.float16, 4100, 256, 32, "the number of rows is no multiple of 8"),
        (torch.float16, 4096, 256, 512, "a scale group is no whole number of code words"),
        (torch.float16, 4096, 1 << 16, 1, "a row has 65536 code words or more"),
    ],
)
def test_what_is_left_to_the_general_kernel(
    dtype: torch.dtype, N: int, words: int, groups: int, reason: str | None
) -> None:
    assert why_general(dtype, N, words, groups) == reason
