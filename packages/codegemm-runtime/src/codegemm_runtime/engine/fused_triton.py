"""RMSNorm with its residual addition, and the gate of an MLP, in Triton.

With PDL (programmatic dependent launch, from compute capability 9.0 on) a kernel starts while its predecessor ends,
and waits before it reads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegemm_runtime.engine.decoder import Norm

GATE_BLOCK = 1024


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """PDL and launch_pdl where the device has programmatic dependent launch; Triton's interpreter knows neither."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    residual_ptr, branch_ptr, branch_weight_ptr, weight_ptr, out_ptr, width, branch_eps, eps,
    BRANCH: tl.constexpr, BRANCH_NORM: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if BRANCH_NORM:
        branch_weight = tl.load(branch_weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if PDL:
        gdc_wait()
    x = tl.load(residual_ptr + at, mask=inside, other=0.0)
    if BRANCH:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH_NORM:
            branch = branch * tl.rsqrt(tl.sum(branch * branch, axis=0) / width + branch_eps) * branch_weight
        x = (x.to(tl.float32) + branch).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, x, mask=inside)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps) * weight
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(residual: Tensor, branch: Tensor | None, branch_norm: Norm | None, norm: Norm) -> Tensor:
    """`fused.add_norm`; a row is one program."""
    rows, width = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        residual,
        residual if branch is None else branch.contiguous(),
        norm.weight if branch_norm is None else branch_norm.weight,
        norm.weight,
        out,
        width,
        0.0 if branch_norm is None else branch_norm.eps,
        norm.eps,
        BRANCH=branch is not None,
        BRANCH_NORM=branch_norm is not None,
        OFFSET=norm.offset,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(residual.device),
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gated(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride,
    SILU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = gate * tl.sigmoid(gate)
    else:  # tanh(z) = 2 sigmoid(2z) - 1
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out_ptr + row * width + column, (y * up).to(out_ptr.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`fused.gated`."""
    rows, width = gate.shape
    out = gate.new_empty((rows, width))
    grid = (rows, triton.cdiv(width, GATE_BLOCK))
    _gated[grid](
        gate,
        up,
        out,
        width,
        gate.stride(0),
        up.stride(0),
        SILU=activation == "silu",
        BLOCK=GATE_BLOCK,
        num_warps=4,
        **launch_options(gate.device),
    )
    return out
