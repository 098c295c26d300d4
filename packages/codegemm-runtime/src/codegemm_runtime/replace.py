"""Swapping linear modules of a model, found in its module tree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from codegemm_kernels.errors import BadInput
from codegemm_kernels.scheme import CodebookScheme
from codegemm_runtime.linear import CodebookLinear


def find_linear(model: nn.Module, name: str) -> nn.Linear | str:
    """The linear module called `name`, or one sentence that says why there is none that can hold codes."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return f"{name} is no module of {type(model).__name__}"
    # A subclass with a forward of its own does something we would silently drop.
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"{name} is a {type(module).__name__}, not a plain linear layer"
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    weight = f"{name}.weight"
    if weight in tied or weight in tied.values():
        return f"{name} is stored as codes but tied to another weight: set tie_word_embeddings to false in config.json"
    return module


def replace_linears(model: nn.Module, schemes: Mapping[str, CodebookScheme]) -> list[str]:
    """Put an uninitialised CodebookLinear in the place of each named nn.Linear; returns the names replaced.

    Device, dtype and bias are those of the module replaced. Raises BadInput, before anything is changed, for a name
    that is no plain linear or a shape the scheme cannot store.
    """
    linears: dict[str, nn.Linear] = {}
    for name, scheme in schemes.items():
        linear = find_linear(model, name)
        if isinstance(linear, str):
            raise BadInput(linear)
        scheme.check_matrix(linear.out_features, linear.in_features, name)
        linears[name] = linear
    for name, linear in linears.items():
        packed = CodebookLinear(
            linear.in_features,
            linear.out_features,
            schemes[name],
            linear.bias is not None,
            linear.weight.dtype,
            linear.weight.device,
        )
        packed.train(linear.training)
        model.set_submodule(name, packed)
    return list(linears)


def restore_linears(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Undo `replace_linears`: every CodebookLinear becomes an nn.Linear with its dequantised weight.

    Returns the names restored. `dtype` None keeps the dtype of the codebooks.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}
    for name, module in packed.items():
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        linear.weight = nn.Parameter(module.dequantize().to(dtype=dtype), requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(dtype=dtype), requires_grad=False)
        linear.train(module.training)
        model.set_submodule(name, linear)
    return list(packed)
