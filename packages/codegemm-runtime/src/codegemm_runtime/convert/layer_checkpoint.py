"""The published system's layer checkpoints: a folder of pickled decoder layers, `0.pth`, `1.pth`, ..."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch import nn
from tqdm import tqdm

from codegemm_kernels.checkpoint import TensorHeader, read_headers
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_runtime.convert import unpickle
from codegemm_runtime.loading import build_on_meta, model_config

OUTSIDE = "not_quantized_weights.pt"
"""Everything that is in no decoder layer: embeddings, head, last norm."""


def layer_files(folder: Path) -> list[Path]:
    """`{i}.pth` in order of i; empty when the folder is no layer checkpoint."""
    return sorted((file for file in folder.glob("*.pth") if file.stem.isdigit()), key=lambda file: int(file.stem))


def copy_weights(folder: Path, base: Path, into: Path) -> dict[str, TensorHeader]:
    """Copy all tensors to safetensors files in `into`, in a process of its own; returns their headers.

    `base` is the original model, whose module tree says where its decoder layers are. Raises CheckpointError for a
    missing layer or file, and for one that cannot be read.
    """
    files = layer_files(folder)
    if not (folder / OUTSIDE).is_file():
        raise CheckpointError(f"{folder} has no {OUTSIDE}, so embeddings, head and last norm are missing")
    command = [sys.executable, "-P", unpickle.__file__, str(into), f"{_container(base, files)}."]
    names = [*map(str, files), str(folder / OUTSIDE)]
    with subprocess.Popen(
        [*command, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in tqdm(process.stdout, total=len(names), desc="read layers", unit="file", dynamic_ncols=True):
            pass
        fault = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise CheckpointError(fault[-1] if fault else f"reading {folder} ended with status {process.returncode}")
    return read_headers(sorted(into.glob("*.safetensors")))


def _container(base: Path, files: list[Path]) -> str:
    """Name of the module list that holds the decoder layers, such as `model.layers`."""
    numbers = [int(file.stem) for file in files]
    gap = next((i for i, number in enumerate(numbers) if i != number), None)
    if gap is not None:
        raise CheckpointError(f"{files[0].parent} has no {gap}.pth: it is incomplete")
    lists: dict[str, int] = {
        name: len(module)
        for name, module in build_on_meta(model_config(base)).named_modules()
        if isinstance(module, nn.ModuleList)
    }
    found = next((name for name, length in lists.items() if length == len(files)), None)
    if found is None:
        lengths = ", ".join(map(str, lists.values()))
        raise BadInput(
            f"{files[0].parent} holds {len(files)} layers, but {base} has {lengths or 'none'}: "
            "the checkpoint is incomplete or --base is another model"
        )
    return found
