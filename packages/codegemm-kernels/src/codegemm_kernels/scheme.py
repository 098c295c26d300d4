"""The recipe of a quantised matrix: how many codebooks, how long a vector, how wide a scale group."""

from __future__ import annotations

import re
from dataclasses import dataclass

from codegemm_kernels.errors import BadInput

CODEBOOK_BITS = 8
CODEBOOK_ENTRIES = 1 << CODEBOOK_BITS
CODES_PER_WORD = 4
MAX_CODEBOOKS = 4
VECTOR_LENGTHS = (4, 8, 16)
_PATTERN = re.compile(r"m(?P<m>[0-9]{1,9})v(?P<v>[0-9]{1,9})(?:b(?P<b>[0-9]{1,9}))?g(?P<g>-1|[0-9]{1,9})")


@dataclass(frozen=True)
class CodebookScheme:
    """`m2v8g128`: 2 codebooks of 256 vectors of 8 weights, one scale for every 128 weights of a row.

    A weight row is reconstructed as `W[n, v*j + t] = scales[n, v*j // g] * sum_i codebooks[i, codes[n, j, i], t]`.
    `group_size` -1 means one scale for the whole row. Codes are bytes (`b8`, implied in the printed form).
    """

    num_codebooks: int
    """m, codes added up for each vector (1 to 4)."""
    vector_length: int
    """v, consecutive input features encoded by one code (4, 8 or 16)."""
    group_size: int = -1
    """g, consecutive input features that share a scale; a multiple of v, or -1 for the whole row."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_codebooks <= MAX_CODEBOOKS:
            raise BadInput(f"scheme {self}: the number of codebooks must be 1 to {MAX_CODEBOOKS}")
        if self.vector_length not in VECTOR_LENGTHS:
            raise BadInput(f"scheme {self}: the vector length must be one of {VECTOR_LENGTHS}")
        if self.group_size != -1 and (not 1 <= self.group_size < 10**9 or self.group_size % self.vector_length):
            raise BadInput(f"scheme {self}: the group size must be -1 or a multiple of {self.vector_length}")

    @classmethod
    def parse(cls, text: str) -> CodebookScheme:
        """Read `m2v8g128` or `m1v4g-1`. Raises BadInput for anything else, naming the form expected."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise BadInput(
                f"unknown scheme {text!r}: write m<codebooks>v<vector length>g<group size>, "
                "for example m2v8g128, or m1v4g-1 for one scale a row"
            )
        if match["b"] is not None and int(match["b"]) != CODEBOOK_BITS:
            raise BadInput(f"scheme {text!r}: only {CODEBOOK_BITS}-bit codes are supported, not {match['b']}")
        return cls(int(match["m"]), int(match["v"]), int(match["g"]))

    def __str__(self) -> str:
        return f"m{self.num_codebooks}v{self.vector_length}g{self.group_size}"

    def num_groups(self, in_features: int) -> int:
        """G, the number of scale groups in a row of `in_features` weights."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def check_matrix(self, out_features: int, in_features: int, name: str = "the matrix") -> None:
        """Raise BadInput, naming `name`, if a matrix of this shape cannot be stored in this scheme."""
        if out_features < 1 or in_features < 1:
            raise BadInput(f"{name} is empty ({out_features} x {in_features})")
        word = CODES_PER_WORD * self.vector_length
        if in_features % word:
            raise BadInput(
                f"{name} has {in_features} input features, which {self} cannot store: they must be a multiple of "
                f"{word} (four codes of {self.vector_length} weights a word); choose a shorter vector or skip it"
            )
        if self.group_size != -1 and in_features % self.group_size:
            raise BadInput(
                f"{name} has {in_features} input features, which is no multiple of the group size of {self}; "
                f"choose a group size that divides it, or g-1 for one scale a row"
            )

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors `codes`, `codebooks` and `scales` of one matrix."""
        self.check_matrix(out_features, in_features)
        m, v = self.num_codebooks, self.vector_length
        return {
            "codes": (m, in_features // (CODES_PER_WORD * v), out_features),
            "codebooks": (m, CODEBOOK_ENTRIES, v),
            "scales": (self.num_groups(in_features), out_features),
        }

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits a weight, codebooks and 16-bit scales included: mb/v + 16/g + 16*m*2^b*v/(NK)."""
        m, v = self.num_codebooks, self.vector_length
        codes = m * CODEBOOK_BITS / v
        scales = 16 * self.num_groups(in_features) / in_features
        codebooks = 16 * m * CODEBOOK_ENTRIES * v / (out_features * in_features)
        return codes + scales + codebooks
