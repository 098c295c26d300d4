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
    """Scales by group, then k-means on parts of the vectors, or on residuals where they cannot be parted equally.

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
    start = _product if v % scheme.num_codebooks == 0 else _residual
    codebooks = start(points[chosen], prices[chosen], scheme.num_codebooks, generator)
    codes = _encode(points, prices, codebooks)
    return CodebookWeight(codes.view(rows, in_features // v, -1), codebooks, scales)


def _product(points: Tensor, prices: Tensor, num_codebooks: int, generator: torch.Generator) -> Tensor:
    """Codebooks that each describe a part of the vector alone and are zero elsewhere, [m, C, v].

    Their error is a tenth larger than that of residual ones, but after the fit, which fills the zeros, it is smaller
    by 1 to 10 percent (m2v8g128): two books that both describe the whole vector are a poor local optimum.
    """
    v = points.shape[1]
    part = v // num_codebooks
    pieces = zip(points.reshape(-1, part).split(MAX_POINTS), prices.reshape(-1, part).split(MAX_POINTS), strict=True)
    book = _lloyd(*next(pieces), generator)
    codebooks = book.new_zeros(num_codebooks, CODEBOOK_ENTRIES, v)
    for i in range(num_codebooks):
        codebooks[i, :, i * part : (i + 1) * part] = book
    return codebooks


def _residual(points: Tensor, prices: Tensor, num_codebooks: int, generator: torch.Generator) -> Tensor:
    """One codebook after the other, each for what the ones before left, then refined jointly, [m, C, v]."""
    residual, books, codes = points, [], []
    for _ in range(num_codebooks):
        book = _lloyd(residual, prices, generator)
        nearest = assign(residual, prices, book)
        residual = residual - book[nearest]
        books.append(book)
        codes.append(nearest)
    return _refine(points, prices, torch.stack(codes, -1), torch.stack(books))


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
