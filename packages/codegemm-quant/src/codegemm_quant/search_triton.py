"""The inner loops of `search` on a GPU: one launch decides all codes of a block of columns.

A program owns 8 rows and walks over the positions of the block; rows never meet. For m = 1, v = 4 a decision is
256 x 5 multiply-adds a row, far less than what one launch costs, so the time is the latency of the walk: 32 positions
a block for v = 4.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
COLUMNS = 128
"""Columns a program keeps in registers; at least `search.BLOCK_COLUMNS`."""


@triton.jit
def _pick(wanted, column, cols):  # type: ignore[no-untyped-def]
    """Column `column` of a register tile [R, COLUMNS]."""
    return tl.sum(tl.where(cols[None, :] == column, wanted, 0.0), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_kernel(  # type: ignore[no-untyped-def]
    pull_ptr, tile_ptr, scales_ptr, norms_ptr, codes_ptr, books_ptr, moved_ptr,
    rows, width, positions, scale_stride, norm_stride, code_stride,
    M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < rows
    cols = tl.arange(0, COLUMNS)
    inside = live[:, None] & (cols < width)[None, :]
    entries = tl.arange(0, 256)
    place = row.to(tl.int64)[:, None] * width + cols[None, :]
    pull = tl.load(pull_ptr + place, mask=inside, other=0.0)
    moved = tl.zeros([R, COLUMNS], dtype=tl.float32)
    for p in range(positions):
        scale = tl.load(scales_ptr + row.to(tl.int64) * scale_stride + p, mask=live, other=0.0)
        for i in tl.static_range(M):
            at = codes_ptr + row.to(tl.int64) * code_stride + p * M + i
            code = tl.load(at, mask=live, other=0)
            norms = tl.load(norms_ptr + i * norm_stride + p * 256 + entries)
            score = (scale * scale)[:, None] * norms[None, :]
            for t in tl.static_range(V):
                wanted = _pick(pull, p * V + t, cols)
                for u in tl.static_range(V):
                    current = scale * tl.load(books_ptr + (i * 256 + code) * V + u)
                    wanted += current * tl.load(tile_ptr + (p * V + u) * width + p * V + t)
                score += (-2.0 * scale * wanted)[:, None] * tl.load(books_ptr + (i * 256 + entries) * V + t)[None, :]
            best = tl.argmin(score, axis=1)
            for u in tl.static_range(V):
                new = tl.load(books_ptr + (i * 256 + best) * V + u)
                step = scale * (new - tl.load(books_ptr + (i * 256 + code) * V + u))
                line = tl.load(tile_ptr + (p * V + u) * width + cols, mask=cols < width, other=0.0)
                pull -= step[:, None] * line[None, :]
                moved += tl.where(cols[None, :] == p * V + u, step[:, None], 0.0)
            tl.store(at, best.to(tl.int64), mask=live)
    tl.store(moved_ptr + place, moved, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _feedback_kernel(  # type: ignore[no-untyped-def]
    remaining_ptr, tile_ptr, inverses_ptr, metrics_ptr, scales_ptr, norms_ptr, codes_ptr, books_ptr, pushed_ptr,
    rows, width, positions, scale_stride, norm_stride, code_stride,
    M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < rows
    cols = tl.arange(0, COLUMNS)
    inside = live[:, None] & (cols < width)[None, :]
    entries = tl.arange(0, 256)
    place = row.to(tl.int64)[:, None] * width + cols[None, :]
    left = tl.load(remaining_ptr + place, mask=inside, other=0.0)  # what is left to represent, all columns
    pushed = tl.zeros([R, COLUMNS], dtype=tl.float32)
    for p in range(positions):
        scale = tl.load(scales_ptr + row.to(tl.int64) * scale_stride + p, mask=live, other=0.0)
        for visit in tl.static_range(VISITS):
            for i in tl.static_range(M):
                at = codes_ptr + row.to(tl.int64) * code_stride + p * M + i
                if visit > 0:
                    code = tl.load(at, mask=live, other=0)
                    for u in tl.static_range(V):
                        back = scale * tl.load(books_ptr + (i * 256 + code) * V + u)
                        left += tl.where(cols[None, :] == p * V + u, back[:, None], 0.0)
                norms = tl.load(norms_ptr + i * norm_stride + p * 256 + entries)
                score = (scale * scale)[:, None] * norms[None, :]
                for t in tl.static_range(V):
                    wanted = tl.zeros([R], dtype=tl.float32)
                    for u in tl.static_range(V):
                        wanted += _pick(left, p * V + u, cols) * tl.load(metrics_ptr + (p * V + u) * V + t)
                    book = tl.load(books_ptr + (i * 256 + entries) * V + t)
                    score += (-2.0 * scale * wanted)[:, None] * book[None, :]
                best = tl.argmin(score, axis=1)
                for u in tl.static_range(V):
                    taken = scale * tl.load(books_ptr + (i * 256 + best) * V + u)
                    left -= tl.where(cols[None, :] == p * V + u, taken[:, None], 0.0)
                tl.store(at, best.to(tl.int64), mask=live)
                tl.debug_barrier()  # the next visit reads these codes back
        for t in tl.static_range(V):
            error = tl.zeros([R], dtype=tl.float32)
            for u in tl.static_range(V):
                error += _pick(left, p * V + u, cols) * tl.load(inverses_ptr + (p * V + u) * V + t)
            pushed += tl.where(cols[None, :] == p * V + t, error[:, None], 0.0)
            later = (cols >= (p + 1) * V) & (cols < width)
            line = tl.load(tile_ptr + (p * V + t) * width + cols, mask=later, other=0.0)
            left -= error[:, None] * line[None, :]
    tl.store(pushed_ptr + place, pushed, mask=inside)


def sweep_block(pull: Tensor, tile: Tensor, scales: Tensor, norms: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """`search._sweep_block` in one launch; codes int64 are changed in place."""
    moved = torch.empty_like(pull)
    grid, sizes = _launch(pull, codes, codebooks, scales, norms)
    _sweep_kernel[grid](pull, tile.contiguous(), scales, norms, codes, codebooks.contiguous(), moved, **sizes)
    return moved


def feedback_block(
    remaining: Tensor,
    tile: Tensor,
    inverses: Tensor,
    metrics: Tensor,
    scales: Tensor,
    norms: Tensor,
    codes: Tensor,
    codebooks: Tensor,
) -> Tensor:
    """`search._feedback_block` in one launch; codes int64 are changed in place."""
    pushed = torch.empty_like(remaining)
    grid, sizes = _launch(remaining, codes, codebooks, scales, norms)
    _feedback_kernel[grid](
        remaining, tile.contiguous(), inverses.contiguous(), metrics.contiguous(),
        scales, norms, codes, codebooks.contiguous(), pushed,
        VISITS=min(len(codebooks), 2), **sizes,
    )  # fmt: skip
    return pushed


def _launch(
    columns: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, norms: Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    rows, width = columns.shape
    sizes = {
        "rows": rows,
        "width": width,
        "positions": codes.shape[1],
        "scale_stride": scales.stride(0),
        "norm_stride": norms.stride(0),
        "code_stride": codes.stride(0),
        "M": len(codebooks),
        "V": codebooks.shape[2],
        "R": ROWS,
        "COLUMNS": COLUMNS,
    }
    return (triton.cdiv(rows, ROWS),), sizes
