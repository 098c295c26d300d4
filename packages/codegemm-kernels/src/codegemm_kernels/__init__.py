"""The floor of CodeGEMM: the stored format, the reference arithmetic, the compiled kernels and their torch ops."""

from codegemm_kernels import ops
from codegemm_kernels.checkpoint import CheckpointMetadata
from codegemm_kernels.errors import BadInput, CheckpointError, NumericalError
from codegemm_kernels.layout import pack_codes, unpack_codes
from codegemm_kernels.scheme import CodebookScheme

__all__ = [
    "BadInput",
    "CheckpointError",
    "CheckpointMetadata",
    "CodebookScheme",
    "NumericalError",
    "ops",
    "pack_codes",
    "unpack_codes",
]
