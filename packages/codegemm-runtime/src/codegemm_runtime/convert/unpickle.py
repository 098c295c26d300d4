"""Copies the tensors out of published layer checkpoints. A script of its own, run in a process of its own.

`python unpickle.py OUT PREFIX FILE...` writes OUT/<stem>.safetensors for every FILE and prints its name. A `{i}.pth` is
a pickled decoder layer: its tensors are stored under PREFIX + `i.`. Everything else is a plain dictionary of tensors.

A pickle names functions to call. Here only those that build tensors are found; any other name becomes an inert object
that keeps what it is given, so a hostile file runs nothing and a layer class that is not installed is no obstacle.
"""

import collections
import copyreg
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

_CALLABLE = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,  # type: ignore[attr-defined]
    ("builtins", "object"): object,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
_QUANTISED = ".quantized_weight."
_PARTS = ("codes", "codebooks", "scales")


class Inert:
    """Stands for any class or function of a pickle; keeps its state and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __new__(cls, *arguments: Any, **options: Any) -> "Inert":  # noqa: D102
        return super().__new__(cls)

    def __call__(self, *arguments: Any, **options: Any) -> "Inert":
        """What the pickle of a method does."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """What a pickled list subclass calls."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CALLABLE.get((module, name))
        if found is None and module == "torch":
            dtype = getattr(torch, name, None)
            found = dtype if isinstance(dtype, torch.dtype) else None
        return type(name, (Inert,), {}) if found is None else found


def _restricted_pickle() -> ModuleType:
    module = ModuleType("restricted_pickle")
    module.__dict__.update(Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load())
    return module


def layer_tensors(layer: Inert) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a pickled decoder layer, with a quantised linear P as `P.codes` etc.

    Raises ValueError for a second-level quantisation, whose tensors do not say what the weight is.
    """
    tensors = {}
    for name, tensor in _walk(layer, ""):
        owner, quantised, part = name.partition(_QUANTISED)
        if quantised and part not in _PARTS:
            raise ValueError(f"{owner} has {part}, from a second quantisation of its scales, which is not supported")
        tensors[f"{owner}.{part}" if quantised else name] = tensor
    return tensors


def _walk(module: Any, prefix: str) -> Any:
    state = module.__dict__
    if state.get("codebook_value_nbits", 16) < 16:
        raise ValueError(f"{prefix}: its codebooks have {state['codebook_value_nbits']}-bit values: not supported")
    hidden = state.get("_non_persistent_buffers_set", ())
    buffers = {name: value for name, value in state.get("_buffers", {}).items() if name not in hidden}
    for name, value in [*state.get("_parameters", {}).items(), *buffers.items()]:
        if value is not None:
            yield prefix + name, value
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def read(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors of one file under their names in the model."""
    if not file.stem.isdigit():
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    else:
        layer = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_restricted_pickle())
        found = layer_tensors(layer) if isinstance(layer, Inert) else {}
        tensors = {f"{prefix}{file.stem}.{name}": tensor for name, tensor in found.items()}
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("it holds no tensors by name")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def main(out: str, prefix: str, *files: str) -> None:
    """Copy the tensors of every file; the first that fails ends the process with one sentence."""
    for file in map(Path, files):
        try:
            tensors = read(file, prefix)
        except Exception as error:  # a damaged or hostile pickle raises anything
            sys.exit(f"{file} cannot be read: {' '.join(str(error).split()) or type(error).__name__}")
        save_file(tensors, Path(out) / f"{file.stem}.safetensors")
        print(file.name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
