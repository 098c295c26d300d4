"""One quantised matrix as it travels between formats: additive codes of any kind, and ours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codegemm_kernels import ops
from codegemm_kernels.checkpoint import PARTS, TensorHeader
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.layout import pack_codes, unpack_codes
from codegemm_kernels.scheme import CODEBOOK_BITS, CODEBOOK_ENTRIES, CodebookScheme


class PackedMatrix(NamedTuple):
    """A matrix in our layout."""

    codes: Tensor
    """int32 [m, K/(4v), N]"""
    codebooks: Tensor
    """[m, 256, v]"""
    scales: Tensor
    """[G, N]"""

    def dequantize(self) -> Tensor:
        """The weight [N, K] in the dtype of the codebooks."""
        weight: Tensor = ops.dequantize(self.codes, self.codebooks, self.scales)
        return weight

    def to_additive(self) -> AdditiveMatrix:
        """The same in AQLM's form, whose codes are signed; the scales of a row must be equal."""
        return AdditiveMatrix(
            unpack_codes(self.codes).view(torch.int8),
            self.codebooks.unsqueeze(2),
            self.scales[0].reshape(-1, 1, 1, 1).clone(),
        )


class AdditiveMatrix(NamedTuple):
    """A matrix in the form in which AQLM and the published layer checkpoints store it.

    Block (r, j) of o x v weights is `scales[r, group of j] * sum_i codebooks[i, codes[r, j, i]]`. Codes count modulo
    2^b, so signed and unsigned ones mean the same.
    """

    codes: Tensor
    """any integer dtype [N/o, J, m]"""
    codebooks: Tensor
    """[m, 2^b, o, v]"""
    scales: Tensor
    """[N/o, G, 1, 1]"""

    def pack(self) -> PackedMatrix:
        """The same matrix in our layout, bit for bit, which `AdditiveForm.scheme` must have found possible."""
        m, entries, _, v = self.codebooks.shape
        codebooks = self.codebooks.new_zeros(m, CODEBOOK_ENTRIES, v)  # entries past 2^b are never looked up
        codebooks[:, :entries] = self.codebooks[:, :, 0]
        scales = self.scales.reshape(self.scales.shape[:2]).t().contiguous()
        return PackedMatrix(pack_codes(self._unsigned()), codebooks, scales)

    def dequantize(self) -> Tensor:
        """The weight [N, K], summed and scaled in fp32."""
        m, _, o, v = self.codebooks.shape
        codes = self._unsigned()
        rows, positions = codes.shape[:2]
        weight = torch.zeros(rows, positions, o, v)
        for i in range(m):
            weight += self.codebooks[i].float()[codes[:, :, i]]
        groups = self.scales.shape[1]
        weight.view(rows, groups, -1).mul_(self.scales.float().reshape(rows, groups, 1))
        return weight.transpose(1, 2).reshape(rows * o, positions * v)

    def _unsigned(self) -> Tensor:
        return self.codes.long() & (self.codebooks.shape[1] - 1)


class AdditiveForm(NamedTuple):
    """What the shapes of an `AdditiveMatrix` say."""

    out_features: int
    in_features: int
    num_codebooks: int
    bits: int
    rows_per_code: int
    vector_length: int
    num_groups: int

    @classmethod
    def from_headers(cls, name: str, headers: dict[str, TensorHeader]) -> AdditiveForm:
        """Read the form of layer `name`. Raises CheckpointError for a tensor that is missing or does not fit."""
        stored = [headers.get(f"{name}.{part}") for part in PARTS]
        for part, header in zip(PARTS, stored, strict=True):
            if header is None:
                raise CheckpointError(f"{name}.{part} is missing: get the checkpoint again")
        codes, codebooks, scales = (header for header in stored if header is not None)
        where = f"the codes {list(codes.shape)}, codebooks {list(codebooks.shape)} and scales {list(scales.shape)}"
        if [len(header.shape) for header in (codes, codebooks, scales)] != [3, 4, 4]:
            raise CheckpointError(f"{where} of {name} are no [N/o, J, m], [m, 2^b, o, v] and [N/o, G, 1, 1]")
        (rows, positions, m), (books, entries, o, v), (scale_rows, groups, *ones) = (
            header.shape for header in (codes, codebooks, scales)
        )
        fits = books == m and scale_rows == rows and ones == [1, 1] and min(rows, positions, m, entries, o, v) > 0
        if not fits or entries & (entries - 1) or groups < 1 or positions % groups:
            raise CheckpointError(f"{where} of {name} do not belong together: get the checkpoint again")
        if not codes.dtype.startswith(("I", "U")) or not all(h.dtype[0] in "FB" for h in (codebooks, scales)):
            raise CheckpointError(f"{name} has codes of {codes.dtype} and codebooks of {codebooks.dtype}")
        return cls(rows * o, positions * v, m, entries.bit_length() - 1, o, v, groups)

    def scheme(self, name: str) -> CodebookScheme:
        """The scheme in which our layout stores the matrix exactly. Raises BadInput, saying why there is none."""
        if self.bits > CODEBOOK_BITS:
            raise BadInput(f"{name} has {self.bits}-bit codes, and ours have {CODEBOOK_BITS} bits")
        if self.rows_per_code != 1:
            raise BadInput(f"{name} has codes for {self.rows_per_code} rows at once, and ours are for one")
        group = -1 if self.num_groups == 1 else self.in_features // self.num_groups
        try:
            scheme = CodebookScheme(self.num_codebooks, self.vector_length, group)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
        scheme.check_matrix(self.out_features, self.in_features, name)
        return scheme
