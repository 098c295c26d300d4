"""Choosing codes: what each code decision costs when errors in different columns interact through H.

The objective of a matrix W [N, K] is sum_n (W - Ŵ)_n H (W - Ŵ)_nᵀ with H = X ᵀX / tokens. Rows are independent, so
every step below treats all rows at once. Columns are visited in blocks: the product of the error with H is one matrix
product a block, and decisions inside the block correct it by products of rank v. The codes are the same as those of a
one-by-one sweep that recomputes everything (AQLM's beam search of width 1), at a fraction of the memory traffic.
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
    v = state.codebooks.shape[2]
    remaining = weight.clone()
    scales = state.vector_scales()
    in_features = weight.shape[1]
    inverses = torch.linalg.inv(_diagonal_blocks(upper, v))
    metrics = inverses @ inverses.transpose(1, 2)
    for first in range(0, in_features, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, in_features)
        pushed = torch.zeros_like(remaining[:, first:last])
        for column in range(first, last, v):
            here, local = slice(column, column + v), slice(column - first, column - first + v)
            target = remaining[:, here]
            position = column // v
            quantised = _nearest_sum(target, metrics[position], scales[:, position], state, position)
            error = (target - quantised) @ inverses[position]
            pushed[:, local] = error
            remaining[:, column + v : last] -= error @ upper[here, column + v : last]
        remaining[:, last:] -= pushed @ upper[first:last, last:]


def _nearest_sum(target: Tensor, metric: Tensor, scale: Tensor, state: CodebookWeight, position: int) -> Tensor:
    """Set the codes of one position so that the scaled sum is nearest to `target` [N, v] in `metric` [v, v]."""
    codes, codebooks = state.codes, state.codebooks
    quantised = torch.zeros_like(target)
    passes = 1 if len(codebooks) == 1 else 2
    for visit in range(passes):
        for i, book in enumerate(codebooks):
            if visit:
                quantised = quantised - scale[:, None] * book[codes[:, position, i]]
            pull = (target - quantised) @ metric
            best = choose(pull, scale, book, _norms(book, metric))
            codes[:, position, i] = best
            quantised = quantised + scale[:, None] * book[best]
    return quantised


def _diagonal_blocks(matrix: Tensor, v: int) -> Tensor:
    """The blocks [K/v, v, v] on the diagonal of a [K, K] matrix."""
    tiles = matrix.view(len(matrix) // v, v, len(matrix) // v, v)
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _norms(book: Tensor, metric: Tensor) -> Tensor:
    """The squared length of every entry in `metric`: [C, v], [v, v] -> [C]."""
    return ((book @ metric) * book).sum(-1)


def choose(pull: Tensor, scale: Tensor, book: Tensor, norms: Tensor) -> Tensor:
    """The entry e that minimises s²·norms[e] - 2·s·book[e]·pull for every row: [N, v], [N], [C, v], [C] -> [N]."""
    features = torch.cat([pull * (-2 * scale[:, None]), scale.square()[:, None]], dim=1)
    return (features @ torch.cat([book, norms[:, None]], dim=1).t()).argmin(1)


def sweep(weight: Tensor, hessian: Tensor, state: CodebookWeight) -> int:
    """One pass of coordinate descent over all codes, in place: each is set to its best value given all others.

    weight fp32 [N, K], hessian fp32 [K, K] symmetric. The objective never rises. Returns how many codes changed.
    """
    codebooks, codes = state.codebooks, state.codes
    num_codebooks, _, v = codebooks.shape
    in_features = weight.shape[1]
    error = weight - state.dequantize()
    scales = state.vector_scales()
    changed = torch.zeros((), dtype=torch.long, device=weight.device)
    diagonal = _diagonal_blocks(hessian, v)
    norms = torch.einsum("mcs,jst,mct->mjc", codebooks, diagonal, codebooks)
    for first in range(0, in_features, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, in_features)
        pull = error @ hessian[:, first:last]
        moved = torch.zeros_like(pull)
        for column in range(first, last, v):
            position, local = column // v, slice(column - first, column - first + v)
            scale = scales[:, position]
            for i in range(num_codebooks):
                before = codes[:, position, i]
                current = scale[:, None] * codebooks[i][before]
                best = choose(pull[:, local] + current @ diagonal[position], scale, codebooks[i], norms[i, position])
                step = scale[:, None] * codebooks[i][best] - current
                pull -= step @ hessian[column : column + v, first:last]
                moved[:, local] += step
                changed += (best != before).sum()
                codes[:, position, i] = best
        error[:, first:last] -= moved
    return int(changed)
