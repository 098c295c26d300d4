"""Weighted k-means: the codebooks before anything is known of how errors in different columns interact."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_kernels.scheme import CODEBOOK_ENTRIES, CodebookScheme
from codegemm_quant.weight import CodebookWeight, EntrySums, expand_codebooks

LLOYD_ROUNDS = 20
JOINT_ROUNDS = 4
MAX_POINTS = 1 << 16
"""Vectors that Lloyd's rounds look at: 256 for each of the 256 centroids."""
_CHUNK = 1 << 16
_CPU_CHUNK = 1 << 14
"""Distances of so many points stay in the cache: 22 ms for 49152 points against 37 ms in one piece."""


def initialise(
    weight: Tensor, importance: Tensor, scheme: CodebookScheme, generator: torch.Generator
) -> CodebookWeight:
    """Scales by group, then residual k-means, one codebook after the other, refined jointly.

    weight fp32 [N, K]; importance [K], the diagonal of H: the price of a squared error in each column. Every vector
    component is weighted by its column's importance and its squared scale, so that centroids sit where the layer's
    output is sensitive (CodeGEMM's and AQLM's k-means is unweighted).
    """
    rows, in_features = weight.shape
    v, groups = scheme.vector_length, scheme.num_groups(in_features)
    grouped = weight.view(rows, groups, -1)
    scales = grouped.square().mean(-1).sqrt().clamp_min(1e-8)
    points = (grouped / scales.unsqueeze(-1)).reshape(-1, v)
    prices = (
        importance.clamp_min(importance.mean() * 1e-3).view(1, groups, -1) * scales.square().unsqueeze(-1)
    ).reshape(-1, v)
    prices = prices / prices.mean()

    chosen = torch.randperm(len(points), generator=generator)[:MAX_POINTS].to(points.device)
    sample, sample_prices = points[chosen], prices[chosen]
    residual, books, sample_codes = sample, [], []
    for _ in range(scheme.num_codebooks):
        book = _lloyd(residual, sample_prices, generator)
        nearest = assign(residual, sample_prices, book)
        residual = residual - book[nearest]
        books.append(book)
        sample_codes.append(nearest)
    codebooks = torch.stack(books)
    if scheme.num_codebooks > 1:
        codebooks = _refine(sample, sample_prices, torch.stack(sample_codes, -1), codebooks)
    codes = _encode(points, prices, codebooks)
    return CodebookWeight(codes.view(rows, in_features // v, -1), codebooks, scales)


def assign(points: Tensor, prices: Tensor, book: Tensor) -> Tensor:
    """Index of the entry with the least priced squared distance to each point: [P, v], [P, v], [C, v] -> [P]."""
    features = torch.cat([prices, -2 * prices * points], dim=1)
    entries = torch.cat([book.square(), book], dim=1).t()
    chunk = _CPU_CHUNK if points.device.type == "cpu" else _CHUNK
    return torch.cat([(some @ entries).argmin(1) for some in features.split(chunk)])


def _lloyd(points: Tensor, prices: Tensor, generator: torch.Generator) -> Tensor:
    start = torch.randperm(len(points), generator=generator)[:CODEBOOK_ENTRIES].to(points.device)
    book = points[start]
    if len(book) < CODEBOOK_ENTRIES:  # a matrix of fewer than 256 vectors: the rest of the book stays unused
        book = torch.cat([book, book.new_zeros(CODEBOOK_ENTRIES - len(book), book.shape[1])])
    for _ in range(LLOYD_ROUNDS):
        book = _centroids(points, prices, assign(points, prices, book), book)
    return book


def _centroids(points: Tensor, prices: Tensor, codes: Tensor, book: Tensor) -> Tensor:
    """Priced means of the points of each entry: [P, v], [P, v], [P], [C, v] -> [C, v]; unused entries stay."""
    sums = EntrySums(codes.view(-1, 1, 1))(torch.cat([prices, prices * points], dim=1))[0]
    mass, moment = sums.split(points.shape[1], dim=1)
    return torch.where(mass > 0, moment / mass.clamp_min(1e-12), book)


def _encode(points: Tensor, prices: Tensor, codebooks: Tensor, codes: Tensor | None = None) -> Tensor:
    """Codes [P, m], each codebook in turn given the others; without starting codes the first pass is greedy."""
    greedy = codes is None
    if codes is None:
        codes = torch.zeros(len(points), len(codebooks), dtype=torch.long, device=points.device)
    residual = points if greedy else points - expand_codebooks(codes.unsqueeze(1), codebooks)
    for i, book in enumerate(codebooks):
        if not greedy:
            residual = residual + book[codes[:, i]]
        codes[:, i] = assign(residual, prices, book)
        residual = residual - book[codes[:, i]]
    return codes if not greedy or len(codebooks) == 1 else _encode(points, prices, codebooks, codes)


def _refine(points: Tensor, prices: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Alternate coordinate descent on codes and weighted means of one codebook given the others."""
    codebooks = codebooks.clone()
    for _ in range(JOINT_ROUNDS):
        codes = _encode(points, prices, codebooks, codes)
        for i in range(len(codebooks)):
            residual = points - expand_codebooks(codes.unsqueeze(1), codebooks) + codebooks[i][codes[:, i]]
            codebooks[i] = _centroids(residual, prices, codes[:, i], codebooks[i])
    return codebooks
