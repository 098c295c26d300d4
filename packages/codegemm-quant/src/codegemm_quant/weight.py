"""One matrix while its codes, codebooks and scales are being fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_kernels import CodebookScheme, pack_codes
from codegemm_kernels.scheme import CODEBOOK_ENTRIES


@dataclass
class CodebookWeight:
    """codes int64 [N, J, m], codebooks fp32 [m, 256, v], scales fp32 [N, G] of a matrix [N, K]; K = J*v.

    Scales stand beside rows here (the transpose of the stored layout) because fitting walks over rows.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @property
    def scheme(self) -> CodebookScheme:
        """The scheme these tensors are in."""
        (_, vectors, m), v, groups = self.codes.shape, self.codebooks.shape[2], self.scales.shape[1]
        return CodebookScheme(m, v, -1 if groups == 1 else vectors * v // groups)

    def vector_scales(self) -> Tensor:
        """The scale of every vector, [N, J]."""
        return self.scales.repeat_interleave(self.codes.shape[1] // self.scales.shape[1], dim=1)

    def unscaled(self) -> Tensor:
        """The sum of the chosen codebook entries, [N, K]."""
        return expand_codebooks(self.codes, self.codebooks)

    def dequantize(self) -> Tensor:
        """The weight [N, K]."""
        rows, groups = self.scales.shape
        return (self.unscaled().view(rows, groups, -1) * self.scales.unsqueeze(-1)).view(rows, -1)

    def clone(self) -> CodebookWeight:
        """A copy that shares nothing."""
        return CodebookWeight(self.codes.clone(), self.codebooks.clone(), self.scales.clone())

    def rounded(self, dtype: torch.dtype) -> CodebookWeight:
        """The same codes with codebooks and scales as they will be stored."""
        return CodebookWeight(self.codes, self.codebooks.to(dtype).float(), self.scales.to(dtype).float())

    def packed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors `codes`, `codebooks` and `scales`, on the CPU."""
        return {
            "codes": pack_codes(self.codes).cpu().contiguous(),
            "codebooks": self.codebooks.detach().to(dtype).cpu().contiguous(),
            "scales": self.scales.detach().t().to(dtype).cpu().contiguous(),
        }


def expand_codebooks(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum over codebooks of the chosen entries: codes [N, J, m], codebooks [m, C, v] -> [N, J*v]."""
    rows, _, num_codebooks = codes.shape
    total = _chosen(codes[:, :, 0], codebooks[0])
    for i in range(1, num_codebooks):
        total = total + _chosen(codes[:, :, i], codebooks[i])
    return total.reshape(rows, -1)


def _chosen(codes: Tensor, book: Tensor) -> Tensor:
    """Entries [N, J, v] of one codebook [C, v].

    An entry of four fp32 values is taken as one number of 16 bytes, two as one of 8: 26 us for half a million on an
    H200 against 323 us for rows, and a third of the time on a CPU. Longer ones are rows (v = 8: 47 us against 103 us).
    """
    kinds = {16: torch.complex128, 8: torch.complex64}
    kind = kinds.get(book.shape[1] * book.itemsize)
    if kind is None:
        return torch.nn.functional.embedding(codes, book)
    return torch.take(book.contiguous().view(kind), codes.long().unsqueeze(-1)).view(book.dtype)


class EntrySums:
    """The adjoint of `expand_codebooks` for codes that stay as they are: sums over the vectors that use each entry.

    On a GPU the vectors are sorted by entry once, here. Sums are made in a fixed order, so that a run repeats to the
    bit.
    """

    def __init__(self, codes: Tensor) -> None:
        """codes [N, J, m], any integers."""
        books = codes.reshape(-1, codes.shape[2]).t().int().contiguous()
        self._books = books if not codes.is_cuda else books.new_empty(0)
        if codes.is_cuda:
            order = books.sort(dim=1, stable=True)
            self._order = order.indices.int()
            bounds = torch.arange(CODEBOOK_ENTRIES + 1, device=codes.device, dtype=torch.int32)
            edges = bounds.expand(len(books), -1).contiguous()
            self._starts = torch.searchsorted(order.values, edges, out_int32=True)

    def __call__(self, values: Tensor) -> Tensor:
        """values [N, J*v] or [N*J, v] -> [m, 256, v]."""
        if values.is_cuda:
            from codegemm_quant.sums_triton import sorted_sums

            return sorted_sums(values.reshape(self._order.shape[1], -1), self._order, self._starts)
        flat = values.reshape(self._books.shape[1], -1)
        backward = torch.ops.aten.embedding_dense_backward
        return torch.stack([backward(flat, book, CODEBOOK_ENTRIES, -1, False) for book in self._books])
