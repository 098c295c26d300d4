"""A checkpoint to convert, whatever its format: its config, its dense tensors and its quantised layers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from codegemm_kernels.checkpoint import (
    PARTS,
    CheckpointMetadata,
    TensorHeader,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.scheme import CodebookScheme
from codegemm_runtime.convert import aqlm
from codegemm_runtime.convert.layer_checkpoint import copy_weights, layer_files
from codegemm_runtime.convert.matrix import AdditiveForm, AdditiveMatrix, PackedMatrix
from codegemm_runtime.inspection import inspect_folder
from codegemm_runtime.loading import resolve_folder

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass
class Source:
    """What was found; every shape in it has been checked, and no weight has been read."""

    format: str
    """`codegemm`, `published`, `aqlm` or `layers`."""
    config: dict[str, Any]
    """config.json without what describes the quantisation."""
    headers: dict[str, TensorHeader]
    companions: Path
    """Folder with the tokenizer."""
    metadata: CheckpointMetadata | None
    """Schemes of the layers that have one; None when there are none."""
    reasons: dict[str, str] = field(default_factory=dict)
    """For each layer that our layout cannot hold, one sentence why: it becomes a dense weight."""

    @property
    def packed(self) -> bool:
        """Whether the quantised layers are stored in our layout."""
        return self.format in ("codegemm", "published")

    @property
    def layers(self) -> list[str]:
        """Names of all quantised layers, those of block 2 before those of block 10."""
        return sorted(quantized_names(self.headers), key=dot_natural_key)

    @property
    def declared_dtype(self) -> str:
        """The dtype of config.json, without one that of the first float stored."""
        declared = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(declared or next(_DTYPES[h.dtype] for h in self.headers.values() if h.dtype in _DTYPES))

    def dense_names(self) -> list[str]:
        """Stored tensors that belong to no quantised layer, biases of quantised layers among them."""
        parts = {f"{name}.{part}" for name in self.layers for part in PARTS}
        return sorted((name for name in self.headers if name not in parts), key=dot_natural_key)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor."""
        with safe_open(self.headers[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def matrix(self, name: str) -> PackedMatrix | AdditiveMatrix:
        """One quantised layer, packed unless `reasons` says why it cannot be."""
        codes, codebooks, scales = (self.tensor(f"{name}.{part}") for part in PARTS)
        if self.packed:
            return PackedMatrix(codes, codebooks, scales)
        matrix = AdditiveMatrix(codes, codebooks, scales)
        return matrix if name in self.reasons else matrix.pack()


@contextmanager
def open_source(folder: Path | str, base: Path | str | None, allow_pickle: bool, scratch: Path) -> Iterator[Source]:
    """Find out what `folder` is. `base`, `allow_pickle` and `scratch`, a folder to make, are for layer checkpoints.

    Raises BadInput or CheckpointError for what cannot be converted, naming the tensor or the option.
    """
    folder = resolve_folder(folder)
    if (folder / "config.json").is_file() or not layer_files(folder):
        if base is not None:
            raise BadInput(f"{folder} is no layer checkpoint, and only those need --base: leave it out")
        yield open_folder(folder)
        return
    if not allow_pickle:
        raise BadInput(f"{folder} is a layer checkpoint, which are pickles: give --allow-pickle to read them")
    if base is None:
        raise BadInput(f"{folder} holds neither config nor tokenizer: name the original model with --base")
    base = resolve_folder(base)
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        headers = copy_weights(folder, base, scratch)
        yield _additive_source("layers", read_config(base), headers, base)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open_folder(folder: Path) -> Source:
    """The source in a folder with a config.json."""
    config = read_config(folder)
    metadata = CheckpointMetadata.from_config(config)
    if metadata is not None:
        problems = inspect_folder(folder).problems
        if problems:
            raise CheckpointError(f"{folder}: {problems[0]}; get or write the checkpoint again")
        format = "published" if "quantization_config" not in config else "codegemm"
        return Source(format, _bare(config), read_headers(checkpoint_files(folder)), folder, metadata)
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        raise BadInput(f"{folder} is a dense model: compress it with `codegemm-quant quantize`")
    if block.get("quant_method") != aqlm.QUANT_METHOD:
        method = block.get("quant_method")
        raise BadInput(f"{folder} is quantised with {method!r}: only codegemm and aqlm checkpoints can be converted")
    source = _additive_source("aqlm", config, read_headers(checkpoint_files(folder)), folder)
    aqlm.check_config(block, {name: AdditiveForm.from_headers(name, source.headers) for name in source.layers})
    return source


def _additive_source(format: str, config: dict[str, Any], headers: dict[str, TensorHeader], companions: Path) -> Source:
    schemes: dict[str, CodebookScheme] = {}
    reasons: dict[str, str] = {}
    for name in sorted(quantized_names(headers), key=dot_natural_key):
        form = AdditiveForm.from_headers(name, headers)
        try:
            schemes[name] = form.scheme(name)
        except BadInput as error:
            reasons[name] = str(error)
    if not schemes and not reasons:
        raise CheckpointError(f"{companions} holds no codes: get the checkpoint again")
    return Source(format, _bare(config), headers, companions, _metadata(schemes), reasons)


def _metadata(schemes: dict[str, CodebookScheme]) -> CheckpointMetadata | None:
    """The most frequent scheme as the default, the others as overrides."""
    if not schemes:
        return None
    ((default, _),) = Counter(schemes.values()).most_common(1)
    return CheckpointMetadata(default, {name: each for name, each in schemes.items() if each != default})


def _bare(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "codegemm")}
