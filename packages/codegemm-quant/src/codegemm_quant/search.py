"""Choosing codes: what each code decision costs when errors in different columns interact through H.

The objective of a matrix W [N, K] is sum_n (W - Ŵ)_n H (W - Ŵ)_nᵀ with H = X ᵀX / tokens. Rows are independent, so
every step below treats all rows at once. Columns are visited in blocks: the product of the error with H is one matrix
product a block, and decisions inside the block correct it by products of rank v. The codes are the same as those of a
one-by-one sweep that recomputes everything (AQLM's beam search of width 1), at a fraction of the memory traffic.

Inside a block every decision waits for the one before. On a CPU each is a few torch calls; on a GPU those would be
thousands of small launches a matrix, so `search_triton` does a whole block in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_quant.weight import CodebookWeight

BLOCK_COLUMNS = 128
"""Columns whose share of error*H is kept up to date between two full products."""


def feedback_codes(weight: Tensor, upper: Tensor, state: CodebookWeight) -> None:
    """Assign every code once, left to right, pushing each vector's error onto the columns not yet coded.

    upper [K, K] is the upper Cholesky factor of the inverse of (damped) H, as in GPTQ: with H⁻¹ = UᵀU the loss is the
    sum over vectors of |(w̃ - q) U_jj⁻¹|², where w̃ is the weight after the corrections from all vectors before.
    """
    in_features, v = weight.shape[1], state.codebooks.shape[2]
    remaining = weight.clone()
    scales = state.vector_scales()
    inverses = torch.linalg.inv(_diagonal_blocks(upper, v))
    metrics = inverses @ inverses.transpose(1, 2)
    norms = _norms(state.codebooks, metrics)
    decide = _feedback_block
    if weight.is_cuda:
        from codegemm_quant.search_triton import feedback_block as decide
    for first in range(0, in_features, BLOCK_COLUMNS):
        here = slice(first, min(first + BLOCK_COLUMNS, in_features))
        positions = slice(here.start // v, here.stop // v)
        pushed = decide(
            remaining[:, here].contiguous(),
            upper[here, here].contiguous(),
            inverses[positions],
            metrics[positions],
            scales[:, positions],
            norms[:, positions],
            state.codes[:, positions],
            state.codebooks,
        )
        remaining[:, here.stop :] -= pushed @ upper[here, here.stop :]


def sweep(weight: Tensor, hessian: Tensor, state: CodebookWeight) -> Tensor:
    """One pass of coordinate descent over all codes, in place: each is set to its best value given all others.

    weight fp32 [N, K], hessian fp32 [K, K] symmetric. The objective never rises. Returns how many codes
    changed, a scalar tensor.
    """
    in_features, v = weight.shape[1], state.codebooks.shape[2]
    before = state.codes.clone()
    error = weight - state.dequantize()
    scales = state.vector_scales()
    norms = _norms(state.codebooks, _diagonal_blocks(hessian, v))
    decide = _sweep_block
    if weight.is_cuda:
        from codegemm_quant.search_triton import sweep_block as decide
    for first in range(0, in_features, BLOCK_COLUMNS):
        here = slice(first, min(first + BLOCK_COLUMNS, in_features))
        positions = slice(here.start // v, here.stop // v)
        error[:, here] -= decide(
            error @ hessian[:, here],
            hessian[here, here].contiguous(),
            scales[:, positions],
            norms[:, positions],
            state.codes[:, positions],
            state.codebooks,
        )
    return (state.codes != before).sum()


def _sweep_block(pull: Tensor, tile: Tensor, scales: Tensor, norms: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Decide the codes [N, P, m] of P positions in place; returns how far the weight moved, [N, P*v].

    pull [N, P*v] is error @ H for these columns, tile [P*v, P*v] their part of H, scales [N, P], norms [m, P, C].
    """
    num_codebooks, _, v = codebooks.shape
    moved = torch.zeros_like(pull)
    for position in range(codes.shape[1]):
        local, scale = slice(position * v, position * v + v), scales[:, position, None]
        for i in range(num_codebooks):
            current = scale * codebooks[i][codes[:, position, i]]
            wanted = pull[:, local] + current @ tile[local, local]
            best = _choose(wanted, scale, codebooks[i], norms[i, position])
            step = scale * codebooks[i][best] - current
            pull -= step @ tile[local]
            moved[:, local] += step
            codes[:, position, i] = best
    return moved


def _feedback_block(
    remaining: Tensor,
    tile: Tensor,
    inverses: Tensor,
    metrics: Tensor,
    scales: Tensor,
    norms: Tensor,
    codes: Tensor,
    codebooks: Tensor,
) -> Tensor:
    """Decide the codes [N, P, m] of P positions in place; returns their errors times U_jj⁻¹, [N, P*v].

    remaining [N, P*v] is the corrected weight, tile [P*v, P*v] the columns' part of U, inverses and metrics [P, v, v].
    With several codebooks each position is visited twice: greedily, then each codebook given the others.
    """
    num_codebooks, _, v = codebooks.shape
    pushed = torch.zeros_like(remaining)
    for position in range(codes.shape[1]):
        local, scale = slice(position * v, position * v + v), scales[:, position, None]
        target = remaining[:, local]
        quantised = torch.zeros_like(target)
        for visit in range(min(num_codebooks, 2)):
            for i, book in enumerate(codebooks):
                if visit:
                    quantised = quantised - scale * book[codes[:, position, i]]
                best = _choose((target - quantised) @ metrics[position], scale, book, norms[i, position])
                quantised = quantised + scale * book[best]
                codes[:, position, i] = best
        pushed[:, local] = (target - quantised) @ inverses[position]
        remaining[:, local.stop :] -= pushed[:, local] @ tile[local, local.stop :]
    return pushed


def _choose(wanted: Tensor, scale: Tensor, book: Tensor, norms: Tensor) -> Tensor:
    """The entry e that minimises s²·norms[e] - 2·s·book[e]·wanted in every row: [N, v], [N, 1], [C, v], [C] -> [N]."""
    features = torch.cat([wanted * (-2 * scale), scale.square()], dim=1)
    return (features @ torch.cat([book, norms[:, None]], dim=1).t()).argmin(1)


def _diagonal_blocks(matrix: Tensor, v: int) -> Tensor:
    """The blocks [K/v, v, v] on the diagonal of a [K, K] matrix."""
    tiles = matrix.view(len(matrix) // v, v, len(matrix) // v, v)
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _norms(codebooks: Tensor, metrics: Tensor) -> Tensor:
    """The squared length of every entry in the metric of every position: [m, C, v], [J, v, v] -> [m, J, C]."""
    return torch.einsum("mcs,jst,mct->mjc", codebooks, metrics, codebooks).contiguous()
