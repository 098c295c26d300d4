"""The `quantization_config` of AQLM checkpoints in Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from codegemm_kernels.errors import CheckpointError
from codegemm_kernels.scheme import CODEBOOK_BITS, CodebookScheme
from codegemm_runtime.convert.matrix import AdditiveForm

QUANT_METHOD = "aqlm"


def check_config(block: Mapping[str, Any], forms: Mapping[str, AdditiveForm]) -> None:
    """Raise CheckpointError for a layer whose tensors are not what the block declares for all layers."""
    try:
        declared = tuple(
            int(block[key]) for key in ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the quantization_config of config.json lacks or garbles {error}") from error
    for name, form in forms.items():
        stored = (form.num_codebooks, form.bits, form.rows_per_code, form.vector_length)
        if stored != declared:
            raise CheckpointError(
                f"{name} has {stored[0]} codebooks of {stored[1]} bits for {stored[2]} x {stored[3]} weights, but "
                f"config.json declares {declared[0]} of {declared[1]} bits for {declared[2]} x {declared[3]}: "
                "restore config.json"
            )


def to_config(scheme: CodebookScheme, dense_linears: Iterable[str]) -> dict[str, Any]:
    """The block for a model whose quantised layers all have `scheme`; `dense_linears` are the names of the others.

    AQLM's own tools list weights and transformers 4 expects that; transformers 5 compares names of modules. So both.
    """
    return {
        "quant_method": QUANT_METHOD,
        "nbits_per_codebook": CODEBOOK_BITS,
        "num_codebooks": scheme.num_codebooks,
        "out_group_size": 1,
        "in_group_size": scheme.vector_length,
        "linear_weights_not_to_quantize": [each for name in dense_linears for each in (f"{name}.weight", name)],
    }
