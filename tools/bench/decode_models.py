"""The models that bench_decode times: built-in shapes with random weights, or a checkpoint folder."""

from __future__ import annotations

from typing import Any

import torch

from codegemm_kernels.errors import BadInput


def build(backend: str, shape: str, scheme: str, dtype: torch.dtype, device: torch.device, room: int) -> Any:
    """The model of a backend, for a context of `room` tokens. Raises BadInput for what a backend cannot do."""
    from codegemm_kernels import CodebookScheme
    from codegemm_runtime import load_model, replace_linears
    from codegemm_runtime.random_models import SHAPES, random_model
    from codegemm_runtime.replace import restore_linears

    if backend.startswith("llama.cpp"):
        from bench.llama_cpp import Model

        if shape not in SHAPES or device.type != "cpu":
            raise BadInput("llama.cpp is timed on the CPU with a built-in shape: leave it out, or change the options")
        return Model(SHAPES[shape], backend.removeprefix("llama.cpp-"), room, torch.get_num_threads())
    if shape in SHAPES:
        if backend == "dense":
            return random_model(shape, device, dtype)
        if backend.startswith("aqlm"):
            return random_model(shape, device, dtype, lambda model, names: replace_by_aqlm(model, names, backend))
        parsed = CodebookScheme.parse(scheme)
        return random_model(
            shape, device, dtype, lambda model, names: replace_linears(model, dict.fromkeys(names, parsed))
        )
    model = load_model(shape, device, dtype)
    if backend == "dense":
        restore_linears(model)
    return model


def replace_by_aqlm(model: Any, names: list[str], backend: str) -> None:
    """Swap in the layers of the aqlm package; BadInput where it is not installed."""
    try:
        from aqlm import QuantizedLinear
    except ImportError as error:
        raise BadInput(f"{backend} needs the package aqlm[gpu] ({error}): install it, or leave it out") from error
    num_codebooks, bits = (2, 8) if backend == "aqlm-2x8" else (1, 16)
    for name in names:
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = QuantizedLinear(
                old.in_features, old.out_features, 8, 1, num_codebooks, bits, bias=False, dtype=old.weight.dtype
            )
        model.set_submodule(name, new)
