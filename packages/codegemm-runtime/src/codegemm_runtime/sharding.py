"""Which part of a stored matrix one rank of tensor parallelism holds: plain arithmetic on the stored tensors.

Outputs can be cut anywhere, as rows are the last axis of `codes` and `scales`. Inputs can be cut only where a packed
word and a scale group end, because a word holds four vectors of a row and a group shares one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.scheme import CODES_PER_WORD, CodebookScheme


@dataclass(frozen=True)
class MatrixShard:
    """Rows and columns of the matrix `name` [out_features, in_features] that one rank multiplies by."""

    name: str
    scheme: CodebookScheme
    out_features: int
    in_features: int
    rows: tuple[tuple[int, int], ...]
    """Ranges of outputs, first and one past the last, in the order in which they are computed."""
    columns: tuple[int, int]
    """Range of inputs."""

    def __post_init__(self) -> None:
        """Raises BadInput, naming the tensor, when the inputs are cut inside a word or a scale group."""
        self.scheme.check_matrix(self.out_features, self.in_features, self.name)
        word, group = CODES_PER_WORD * self.scheme.vector_length, self.scheme.group_size
        for border in self.columns:
            if border % word:
                self._refuse("codes", border, f"a packed word of {word} weights")
            if self._groups > 1 and border % group:
                self._refuse("scales", border, f"a scale group of {group} weights")

    @classmethod
    def by_rows(
        cls, name: str, scheme: CodebookScheme, size: tuple[int, int], rank: int, ranks: int, parts: tuple[int, ...]
    ) -> MatrixShard:
        """The column-parallel share of `rank` (column of x W^T): every output of `parts` cut into `ranks` ranges.

        `size` is (out_features, in_features). `parts` are the sizes of matrices that were stored as one, such as
        q, k and v; `(out_features,)` for a matrix on its own. Raises BadInput when a part does not divide.
        """
        rows, start = [], 0
        for part in parts:
            if part % ranks:
                raise BadInput(f"{name} has {part} outputs, which {ranks} ranks cannot share: change their number")
            share = part // ranks
            rows.append((start + rank * share, start + (rank + 1) * share))
            start += part
        if start != size[0]:
            raise BadInput(f"{name} has {size[0]} outputs, but the model splits it into {list(parts)}")
        return cls(name, scheme, *size, tuple(rows), (0, size[1]))

    @classmethod
    def by_columns(cls, name: str, scheme: CodebookScheme, size: tuple[int, int], rank: int, ranks: int) -> MatrixShard:
        """The row-parallel share of `rank` (rows of W^T): one range of inputs, whose products the ranks add up.

        Raises BadInput, naming the tensor, when the inputs cannot be cut there.
        """
        if size[1] % ranks:
            raise BadInput(f"{name} has {size[1]} inputs, which {ranks} ranks cannot share: change their number")
        share = size[1] // ranks
        return cls(name, scheme, *size, ((0, size[0]),), (rank * share, (rank + 1) * share))

    @property
    def _groups(self) -> int:
        """Scales of a row; a single one holds for any part of it."""
        return self.scheme.num_groups(self.in_features)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of this rank."""
        return sum(last - first for first, last in self.rows), self.columns[1] - self.columns[0]

    def cut(self, part: str, tensor: Tensor) -> Tensor:
        """This rank's `codes`, `codebooks` or `scales` from the stored tensor: a view, or a copy of several ranges.

        Raises CheckpointError when the stored tensor is not that of this matrix.
        """
        wanted = self.scheme.shapes(self.out_features, self.in_features)[part]
        if tuple(tensor.shape) != wanted or (part == "codes") != (tensor.dtype == torch.int32):
            raise CheckpointError(
                f"{self.name}.{part} is {tensor.dtype} {list(tensor.shape)}, but {self.scheme} of a "
                f"{self.out_features} x {self.in_features} layer needs "
                f"{'int32' if part == 'codes' else 'floats'} {list(wanted)}: get or write the checkpoint again"
            )
        if part == "codebooks":
            return tensor
        if part == "codes":
            word = CODES_PER_WORD * self.scheme.vector_length
            tensor = tensor[:, self.columns[0] // word : self.columns[1] // word]
        elif self._groups > 1:
            tensor = tensor[self.columns[0] // self.scheme.group_size : self.columns[1] // self.scheme.group_size]
        ranges = [tensor[..., first:last] for first, last in self.rows]
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=-1)

    def _refuse(self, part: str, border: int, unit: str) -> None:
        raise BadInput(
            f"{self.name}.{part} cannot be shared: {self.in_features} inputs would be cut at {border}, inside {unit}; "
            f"use another tensor parallel size, or quantize with a smaller group size or vector length"
        )
