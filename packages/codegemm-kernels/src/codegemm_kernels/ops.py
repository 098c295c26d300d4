"""The torch ops `codegemm::gemm`, `gemm_grouped` and `dequantize`. With `step` the only importer of `_C`.

A call checks everything a kernel relies on (`checks`), allocates the result and passes addresses. The default
implementation, for devices without a kernel, is `reference`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from codegemm_kernels import _C, reference
from codegemm_kernels.checks import DTYPES, check_devices, check_group, check_input, check_tiling, check_weight
from codegemm_kernels.errors import BadInput
from codegemm_kernels.kernel_choice import suits_cuda_kernels
from codegemm_kernels.scheme import CODES_PER_WORD

# On the CPU, x with many rows is multiplied by dequantised panels of W: see docs/log.md, CPU kernels.
_MIN_PANEL_FEATURES = 256  # below, the kernel is quicker than the calls to torch
_PANEL_BYTES = 4 << 20
# On a GPU the same where kernel_choice says so.
_CUDA_PANEL_BYTES = 32 << 20  # stays in the L2 of an H200 (60 MB) between its two uses; at most half a matrix
_MIN_CUDA_PANEL_ROWS = 1152  # products of fewer rows leave multiprocessors idle: K = 28672 in 10 % less time
_NO_CUDA = (
    "this build of codegemm-kernels has no CUDA kernels: rebuild it where nvcc is found (CODEGEMM_CUDA=ON, with "
    "CUDA_HOME set if nvcc is not on PATH) or with CODEGEMM_CUDA=PIP, or move the model to the CPU"
)


def _as_rows(x: Tensor) -> Tensor:
    """View x [..., K] as rows [M, K] whose elements are adjacent, copying only where no such view exists."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The rows and the weights, copied where a weight is not contiguous.

    CUDA kernels read weights before the kernel in front of them has ended, and x after: the copy of the rows keeps
    weights that were made just now from being read too early.
    """
    if all(weight.is_contiguous() for weight in weights):
        return (rows, *weights)
    weights = tuple(weight.contiguous() for weight in weights)
    return (rows.clone(), *weights)


def _new_output(x: Tensor, N: int) -> Tensor:
    shape = x.shape
    return x.new_empty((shape[0], N)) if len(shape) == 2 else x.new_empty((*shape[:-1], N))


def _gemm_cpu(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    N, K, num_groups = check_weight(codes, codebooks, scales)
    check_input(x, bias, codes, codebooks, N, K)
    y = _new_output(x, N)
    if y.numel() == 0:
        return y
    rows = _as_rows(x)
    codes, codebooks, scales = codes.contiguous(), codebooks.contiguous(), scales.contiguous()
    if rows.shape[0] > _C.max_gemm_rows() and K >= _MIN_PANEL_FEATURES:
        _gemm_by_panels(rows, codes, codebooks, scales, bias, y.view(-1, N))
        return y
    bias = None if bias is None else bias.contiguous()
    _C.gemm_cpu(
        codes=codes.data_ptr(),
        codebooks=codebooks.data_ptr(),
        scales=scales.data_ptr(),
        num_codebooks=codebooks.shape[0],
        vector_length=codebooks.shape[2],
        num_groups=num_groups,
        out_features=N,
        in_features=K,
        dtype=DTYPES[x.dtype],
        x=rows.data_ptr(),
        x_row_stride=rows.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows.shape[0],
        tiled=codes.dtype == torch.uint8,
        threads=torch.get_num_threads(),
    )
    return y


@torch.no_grad()
def _gemm_by_panels(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fill y [M, N] panel by panel: dequantise some rows of W into a buffer that stays in the cache, multiply by torch.

    A buffer for all of W would cost more than the decoding: fresh memory is cleared page by page.
    """
    N, K = y.shape[1], x.shape[1]
    if x.dtype == torch.float16:  # torch multiplies fp16 slower than fp32 on processors without fp16 arithmetic
        x, codebooks, scales = x.float(), codebooks.float(), scales.float()
        bias = None if bias is None else bias.float()
    step = max(_PANEL_BYTES // (K * x.element_size()) // 16, 1) * 16
    panel = x.new_empty((min(step, N), K))
    for first in range(0, N, step):
        last = min(first + step, N)
        _dequantize_rows(codes, codebooks, scales, first, last, panel)
        part = None if bias is None else bias[first:last]
        y[:, first:last] = torch.nn.functional.linear(x, panel[: last - first], part)


def _dequantize_rows(codes: Tensor, codebooks: Tensor, scales: Tensor, first: int, last: int, rows: Tensor) -> None:
    """Write rows first .. last - 1 of W to the leading rows of `rows`; all tensors contiguous and checked."""
    integers = {
        "codes": codes.data_ptr(),
        "codebooks": codebooks.data_ptr(),
        "scales": scales.data_ptr(),
        "num_codebooks": codebooks.shape[0],
        "vector_length": codebooks.shape[2],
        "num_groups": scales.shape[0],
        "out_features": scales.shape[1],
        "in_features": rows.shape[1],
        "dtype": DTYPES[codebooks.dtype],
        "y": rows.data_ptr(),
        "first_row": first,
        "rows": last - first,
    }
    if codes.is_cuda:
        device = codes.get_device()
        _C.dequantize_cuda(**integers, device=device, stream=torch._C._cuda_getCurrentRawStream(device))
    else:
        _C.dequantize_cpu(**integers, tiled=codes.dtype == torch.uint8, threads=torch.get_num_threads())


def _gemm_cuda(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _C.has_cuda:
        raise BadInput(_NO_CUDA)
    N, K, num_groups = check_weight(codes, codebooks, scales)
    check_input(x, bias, codes, codebooks, N, K)
    y = _new_output(x, N)
    if y.numel() == 0:
        return y
    rows, codes, codebooks, scales = _contiguous(_as_rows(x), codes, codebooks, scales)
    if not suits_cuda_kernels(rows, codes, codebooks, scales):
        _gemm_by_cuda_panels(rows, codes, codebooks, scales, bias, y.view(-1, N))
        return y
    bias = None if bias is None else bias.contiguous()
    device = x.get_device()
    _C.gemm_cuda(
        codes=codes.data_ptr(),
        codebooks=codebooks.data_ptr(),
        scales=scales.data_ptr(),
        num_codebooks=codebooks.shape[0],
        vector_length=codebooks.shape[2],
        num_groups=num_groups,
        out_features=N,
        in_features=K,
        dtype=DTYPES[x.dtype],
        x=rows.data_ptr(),
        x_row_stride=rows.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows.shape[0],
        device=device,
        stream=torch._C._cuda_getCurrentRawStream(device),  # current_stream(device).cuda_stream without its objects
    )
    return y


@torch.no_grad()
def _gemm_by_cuda_panels(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fill y [M, N] panel by panel through one buffer: never more than half of the dense W exists."""
    N, K = y.shape[1], x.shape[1]
    rows = min(max(_CUDA_PANEL_BYTES // (K * x.element_size()), _MIN_CUDA_PANEL_ROWS), (N + 1) // 2)
    step = max(rows // 128, 1) * 128
    panel = x.new_empty((min(step, N), K))
    for first in range(0, N, step):
        last = min(first + step, N)
        _dequantize_rows(codes, codebooks, scales, first, last, panel)
        weight = panel[: last - first].t()
        if bias is None:
            torch.mm(x, weight, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, weight, out=y[:, first:last])


def _gemm_grouped(
    x: Tensor, codes: list[Tensor], codebooks: list[Tensor], scales: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    check_group(codes, codebooks, scales, biases)
    return [gemm(x, *one) for one in zip(codes, codebooks, scales, biases, strict=True)]


def _gemm_grouped_compiled(
    x: Tensor, codes: list[Tensor], codebooks: list[Tensor], scales: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    check_group(codes, codebooks, scales, biases)
    rows = _as_rows(x)
    if not _fit_one_launch(rows, codes, codebooks, scales):
        return _gemm_grouped(x, codes, codebooks, scales, biases)
    ys = []
    for one in zip(codes, codebooks, scales, biases, strict=True):
        N, K, num_groups = check_weight(*one[:3])
        check_input(x, one[3], one[0], one[1], N, K)
        ys.append(_new_output(x, N))
    rows, *stored = _contiguous(rows, *codes, *codebooks, *scales)
    count = len(codes)
    codes, codebooks, scales = stored[:count], stored[count : 2 * count], stored[2 * count :]
    biases = [None if t is None else t.contiguous() for t in biases]
    arguments: dict[str, Any] = {
        "codes": [t.data_ptr() for t in codes],
        "codebooks": [t.data_ptr() for t in codebooks],
        "scales": [t.data_ptr() for t in scales],
        "biases": [0 if t is None else t.data_ptr() for t in biases],
        "ys": [t.data_ptr() for t in ys],
        "out_features": [t.shape[-1] for t in ys],
        "num_codebooks": codebooks[0].shape[0],
        "vector_length": codebooks[0].shape[2],
        "num_groups": num_groups,
        "in_features": K,
        "dtype": DTYPES[x.dtype],
        "x": rows.data_ptr(),
        "x_row_stride": rows.stride(0),
        "rows": rows.shape[0],
    }
    if x.is_cuda:
        device = x.get_device()
        _C.gemm_grouped_cuda(**arguments, device=device, stream=torch._C._cuda_getCurrentRawStream(device))
    else:
        _C.gemm_grouped_cpu(**arguments, tiled=codes[0].dtype == torch.uint8, threads=torch.get_num_threads())
    return ys


def _fit_one_launch(rows: Tensor, codes: list[Tensor], codebooks: list[Tensor], scales: list[Tensor]) -> bool:
    """Whether there are several matrices of one scheme and order of codes, and few enough rows for the kernels."""
    schemes = {(one.shape[0], one.shape[2]) for one in codebooks if one.dim() == 3}
    same = len(schemes) == len({len(one) for one in scales}) == len({one.dtype for one in codes}) == 1
    if not same or rows.shape[0] == 0 or len(codes) < 2 or any(one.dim() != 3 for one in [*codebooks, *codes]):
        return False
    if not rows.is_cuda:
        return rows.shape[0] <= _C.max_gemm_rows()
    return _C.has_cuda and all(suits_cuda_kernels(rows, *one) for one in zip(codes, codebooks, scales, strict=True))


def _gemm_grouped_fake(
    x: Tensor, codes: list[Tensor], codebooks: list[Tensor], scales: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    check_group(codes, codebooks, scales, biases)
    return [_gemm_fake(x, *one) for one in zip(codes, codebooks, scales, biases, strict=True)]


def _gemm_fake(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    check_devices(x, codes, codebooks, scales, bias)
    N, K, _ = check_weight(codes, codebooks, scales)
    check_input(x, bias, codes, codebooks, N, K)
    return _new_output(x, N)


def _dequantize_whole(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    N, K, _ = check_weight(codes, codebooks, scales)
    y = codebooks.new_empty((N, K))
    if N:
        _dequantize_rows(codes.contiguous(), codebooks.contiguous(), scales.contiguous(), 0, N, y)
    return y


def _dequantize_cuda(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    if not _C.has_cuda:
        raise BadInput(_NO_CUDA)
    return _dequantize_whole(codes, codebooks, scales)


def _dequantize_fake(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    check_devices(codes, codebooks, scales)
    N, K, _ = check_weight(codes, codebooks, scales)
    return codebooks.new_empty((N, K))


def _other_order(codes: Tensor, vector_length: int, num_groups: int, order: torch.dtype) -> Tensor:
    """Room for codes of the stored order (int32) as tiled ones (uint8), or the reverse."""
    check_tiling(codes, vector_length, num_groups, order)
    m, places, N = codes.shape
    if order == torch.int32:
        return codes.new_empty((m, places * CODES_PER_WORD, N), dtype=torch.uint8)
    return codes.new_empty((m, places // CODES_PER_WORD, N), dtype=torch.int32)


def _reorder(codes: Tensor, vector_length: int, num_groups: int, order: torch.dtype) -> Tensor:
    y = _other_order(codes, vector_length, num_groups, order)
    if y.numel() == 0:
        return y
    m, N, K = check_tiling(codes, vector_length, num_groups, order)
    codes = codes.contiguous()  # under a name: a copy must live until it has been read
    (_C.tile if order == torch.int32 else _C.untile)(
        codes=codes.data_ptr(),
        num_codebooks=m,
        vector_length=vector_length,
        num_groups=num_groups,
        out_features=N,
        in_features=K,
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y


_LIBRARY = torch.library.Library("codegemm", "DEF")
_LIBRARY.define("gemm(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias=None) -> Tensor")
_LIBRARY.define("dequantize(Tensor codes, Tensor codebooks, Tensor scales) -> Tensor")
_LIBRARY.impl("gemm", reference.checked_gemm, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", reference.checked_dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("gemm", _gemm_cpu, "CPU")
_LIBRARY.impl("dequantize", _dequantize_whole, "CPU")
_LIBRARY.impl("gemm", _gemm_cuda, "CUDA")
_LIBRARY.impl("dequantize", _dequantize_cuda, "CUDA")
_LIBRARY.define(
    "gemm_grouped(Tensor x, Tensor[] codes, Tensor[] codebooks, Tensor[] scales, Tensor?[] biases) -> Tensor[]"
)
_LIBRARY.impl("gemm_grouped", _gemm_grouped, "CompositeExplicitAutograd")
_LIBRARY.impl("gemm_grouped", _gemm_grouped_compiled, "CPU")
_LIBRARY.impl("gemm_grouped", _gemm_grouped_compiled, "CUDA")
_LIBRARY.define("tile(Tensor codes, int vector_length, int num_groups) -> Tensor")
_LIBRARY.define("untile(Tensor codes, int vector_length, int num_groups) -> Tensor")
for _name, _order in (("tile", torch.int32), ("untile", torch.uint8)):
    _LIBRARY.impl(_name, partial(_reorder, order=_order), "CPU")
    torch.library.register_fake(f"codegemm::{_name}", partial(_other_order, order=_order), lib=_LIBRARY)
torch.library.register_fake("codegemm::gemm", _gemm_fake, lib=_LIBRARY)
torch.library.register_fake("codegemm::dequantize", _dequantize_fake, lib=_LIBRARY)
torch.library.register_fake("codegemm::gemm_grouped", _gemm_grouped_fake, lib=_LIBRARY)

gemm = torch.ops.codegemm.gemm.default
"""`x @ W.T + bias` for x [..., K] and a stored matrix W [N, K]: one dtype throughout, sums in fp32.

On a GPU, weights may be read before the kernel in front of this one has ended: make x after them."""
gemm_grouped = torch.ops.codegemm.gemm_grouped.default
"""`gemm` of one x with several matrices (q, k and v; gate and up), each with its own codebooks: one launch on a GPU."""
dequantize = torch.ops.codegemm.dequantize.default
"""W [N, K] of a stored matrix, in the dtype of `codebooks`."""

tile = torch.ops.codegemm.tile.default
"""Stored codes int32 [m, K/(4v), N] to tiled ones, uint8 [m, K/v, N]: the same bytes in the order in which the CPU
kernels read them (csrc/cpu/tiling.h). The ops above take either; the tiled ones are for the CPU only."""
untile = torch.ops.codegemm.untile.default
"""Undo `tile`."""


def available_kernels() -> tuple[str, bool]:
    """The instruction set whose CPU kernels run on this processor, and whether the CUDA kernels were compiled in."""
    return _C.cpu_features(), _C.has_cuda
