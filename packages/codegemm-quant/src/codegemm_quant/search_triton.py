"""The inner loops of `search` on a GPU: one launch decides all codes of a block of columns.

A program owns a few rows and walks over the positions of the block; rows never meet. For m = 1, v = 4 a decision is
256 x 5 multiply-adds a row, far less than what one launch costs, so the time is the latency of the walk: 32 positions
a block for v = 4. A block's columns stay in registers as [rows, positions, v].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
"""Rows of a program: 8 take 240 registers a thread for m2v8 on sm_90 and spill for v = 16, 4 take 170."""
COLUMNS = 128
"""Columns a program keeps in registers; at least `search.BLOCK_COLUMNS`."""


@triton.jit  # type: ignore[untyped-decorator]
def _best_entry(wanted, scale, book_ptr, norms_ptr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """The entry with the least s²·norm - 2·s·entry·wanted: wanted [R, V], scale [R] -> int64 [R]."""
    entries = tl.arange(0, 256)
    book = tl.load(book_ptr + entries[:, None] * V + tl.arange(0, V)[None, :])
    match = tl.sum(wanted[:, None, :] * book[None, :, :], axis=2)
    norms = tl.load(norms_ptr + entries)
    return tl.argmin((scale * scale)[:, None] * norms[None, :] - 2.0 * scale[:, None] * match, axis=1).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_kernel(  # type: ignore[no-untyped-def]
    pull_ptr, tile_ptr, scales_ptr, norms_ptr, codes_ptr, books_ptr, moved_ptr,
    rows, width, positions, scale_stride, norm_stride, code_stride,
    M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    live = row < rows
    part, place = tl.arange(0, V), tl.arange(0, P)
    column = place[:, None] * V + part[None, :]
    inside = live[:, None, None] & (column < width)[None, :, :]
    address = row[:, None, None] * width + column[None, :, :]
    pull = tl.load(pull_ptr + address, mask=inside, other=0.0)
    moved = tl.zeros([R, P, V], dtype=tl.float32)
    for p in range(positions):
        here = (place == p)[None, :, None]
        scale = tl.load(scales_ptr + row * scale_stride + p, mask=live, other=0.0)
        own = tl.load(tile_ptr + (p * V + part[:, None]) * width + p * V + part[None, :])
        for i in tl.static_range(M):
            at = codes_ptr + row * code_stride + p * M + i
            book_ptr = books_ptr + i * 256 * V
            code = tl.load(at, mask=live, other=0)
            current = scale[:, None] * tl.load(book_ptr + code[:, None] * V + part[None, :])
            wanted = tl.sum(tl.where(here, pull, 0.0), axis=1) + tl.sum(current[:, :, None] * own[None, :, :], axis=1)
            best = _best_entry(wanted, scale, book_ptr, norms_ptr + i * norm_stride + p * 256, V)
            step = scale[:, None] * tl.load(book_ptr + best[:, None] * V + part[None, :]) - current
            for u in tl.static_range(V):
                line = tl.load(tile_ptr + (p * V + u) * width + column, mask=column < width, other=0.0)
                amount = tl.sum(tl.where((part == u)[None, :], step, 0.0), axis=1)
                pull -= amount[:, None, None] * line[None, :, :]
            moved += tl.where(here, step[:, None, :], 0.0)
            tl.store(at, best, mask=live)
    tl.store(moved_ptr + address, moved, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _feedback_kernel(  # type: ignore[no-untyped-def]
    remaining_ptr, tile_ptr, inverses_ptr, metrics_ptr, scales_ptr, norms_ptr, codes_ptr, books_ptr, pushed_ptr,
    rows, width, positions, scale_stride, norm_stride, code_stride,
    M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, P: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    live = row < rows
    part, place = tl.arange(0, V), tl.arange(0, P)
    column = place[:, None] * V + part[None, :]
    inside = live[:, None, None] & (column < width)[None, :, :]
    address = row[:, None, None] * width + column[None, :, :]
    left = tl.load(remaining_ptr + address, mask=inside, other=0.0)  # what is still to be represented
    pushed = tl.zeros([R, P, V], dtype=tl.float32)
    for p in range(positions):
        here = (place == p)[None, :, None]
        scale = tl.load(scales_ptr + row * scale_stride + p, mask=live, other=0.0)
        square = p * V * V + part[:, None] * V + part[None, :]
        metric = tl.load(metrics_ptr + square)
        rest = tl.sum(tl.where(here, left, 0.0), axis=1)
        for visit in tl.static_range(VISITS):
            for i in tl.static_range(M):
                at = codes_ptr + row * code_stride + p * M + i
                book_ptr = books_ptr + i * 256 * V
                if visit > 0:
                    code = tl.load(at, mask=live, other=0)
                    rest += scale[:, None] * tl.load(book_ptr + code[:, None] * V + part[None, :])
                wanted = tl.sum(rest[:, :, None] * metric[None, :, :], axis=1)
                best = _best_entry(wanted, scale, book_ptr, norms_ptr + i * norm_stride + p * 256, V)
                rest -= scale[:, None] * tl.load(book_ptr + best[:, None] * V + part[None, :])
                tl.store(at, best, mask=live)
                tl.debug_barrier()  # the second visit reads these codes back
        error = tl.sum(rest[:, :, None] * tl.load(inverses_ptr + square)[None, :, :], axis=1)
        later = (column >= (p + 1) * V) & (column < width)
        for t in tl.static_range(V):
            line = tl.load(tile_ptr + (p * V + t) * width + column, mask=later, other=0.0)
            amount = tl.sum(tl.where((part == t)[None, :], error, 0.0), axis=1)
            left -= amount[:, None, None] * line[None, :, :]
        pushed += tl.where(here, error[:, None, :], 0.0)
    tl.store(pushed_ptr + address, pushed, mask=inside)


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
        "P": COLUMNS // codebooks.shape[2],
    }
    return (triton.cdiv(rows, ROWS),), sizes
