from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from codegemm_kernels import CodebookScheme, pack_codes

Weight = tuple[Tensor, Tensor, Tensor]

# Where there is no CUDA device the tests of it are not collected, so nothing has to be skipped.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def make_weight() -> Callable[..., Weight]:
    """Random (codes, codebooks, scales) of an N x K matrix in the scheme given."""

    def make(
        scheme: str, N: int, K: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> Weight:
        generator = torch.Generator().manual_seed(seed)
        shapes = CodebookScheme.parse(scheme).shapes(N, K)
        m, _, v = shapes["codebooks"]
        codes = pack_codes(torch.randint(0, 256, (N, K // v, m), generator=generator))
        codebooks = torch.randn(shapes["codebooks"], generator=generator) * 0.5
        scales = torch.rand(shapes["scales"], generator=generator) * 0.1 + 0.02
        return codes.to(device), codebooks.to(device, dtype), scales.to(device, dtype)

    return make
