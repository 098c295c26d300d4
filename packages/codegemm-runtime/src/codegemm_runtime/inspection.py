"""What is in a checkpoint folder, what it would take in memory, and what would not load and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from codegemm_kernels.checkpoint import (
    PARTS,
    CheckpointMetadata,
    TensorHeader,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.checksums import checksum_problems
from codegemm_kernels.errors import BadInput
from codegemm_kernels.kernel_choice import why_general
from codegemm_kernels.scheme import CODES_PER_WORD, CodebookScheme
from codegemm_runtime.loading import build_on_meta, model_config, resolve_folder


@dataclass(frozen=True)
class LayerRow:
    """One quantised layer as it is stored."""

    name: str
    out_features: int
    in_features: int
    scheme: CodebookScheme
    nbytes: int
    """Bytes of codes, codebooks, scales and bias."""
    slow: str | None
    """Why this machine's GPU runs it by the general kernel, many times slower; None for the fast ones."""

    @property
    def bits(self) -> float:
        """Stored bits a weight with 16-bit codebooks and scales, whatever dtype they have in the file."""
        return self.scheme.bits_per_weight(self.out_features, self.in_features)


@dataclass
class Inspection:
    """Everything known about a folder; of a broken one, what could be found out before it broke."""

    folder: str
    model: str | None = None
    dtype: str | None = None
    scheme: str | None = None
    published: bool = False
    """Whether the metadata is the published system's `codegemm` block."""
    layers: list[LayerRow] = field(default_factory=list)
    total_bytes: int = 0
    kernels: str = ""
    verified: bool = False
    """Whether every number stored was read and is finite, and the files are those of the checksums if there are any."""
    checksums: bool = False
    """Whether the folder keeps checksums and they were compared."""
    problems: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of weights stored as codes."""
        return sum(row.out_features * row.in_features for row in self.layers)

    @property
    def bits_per_weight(self) -> float | None:
        """Average over the quantised weights, None when there are none."""
        if not self.layers:
            return None
        return sum(row.bits * row.out_features * row.in_features for row in self.layers) / self.weights

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same model with 16-bit weights where it now has codes."""
        return self.total_bytes - sum(row.nbytes for row in self.layers) + 2 * self.weights

    def summary(self) -> dict[str, Any]:
        """The JSON object of `codegemm-runtime inspect`."""
        return {
            "folder": self.folder,
            "model": self.model,
            "scheme": self.scheme,
            "bits_per_weight": self.bits_per_weight,
            "dtype": self.dtype,
            "layers": len(self.layers),
            "bytes_dense": self.dense_bytes,
            "bytes": self.total_bytes,
            "kernels": self.kernels,
            "general_kernels": {row.name: row.slow for row in self.layers if row.slow},
            "verified": self.verified,
            "checksums": self.checksums,
            "problems": self.problems,
        }

    def table(self) -> str:
        """The rows and totals as text."""
        width = max((len(row.name) for row in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'out x in':>15}  {'scheme':>10}  {'bits':>6}  {'bytes':>13}  kernel"] * bool(
            self.layers
        )
        lines += [
            f"{row.name:{width}}  {f'{row.out_features} x {row.in_features}':>15}  {row.scheme!s:>10}  "
            f"{row.bits:6.3f}  {row.nbytes:13,}  {f'general: {row.slow}' if row.slow else 'fast'}"
            for row in self.layers
        ]
        quantised = sum(row.nbytes for row in self.layers)
        origin = " (published codegemm block)" if self.published else ""
        bits = "" if self.bits_per_weight is None else f", {self.bits_per_weight:.3f} bits a weight"
        lines += [
            "",
            f"model    {self.model}, {self.dtype}",
            f"scheme   {self.scheme or ('none, a dense model' if self.total_bytes else 'unknown')}{origin}{bits}",
            f"bytes    {self.total_bytes:,}: {quantised:,} in {len(self.layers)} quantised layers, "
            f"{self.total_bytes - quantised:,} dense; {self.dense_bytes:,} with 16-bit weights",
            f"kernels  {self.kernels}",
        ]
        sound = "this folder loads" + (" and every number in it is finite" if self.verified else "")
        sound += "; its files are those of its checksums" if self.verified and self.checksums else ""
        lines += [f"problem  {problem}" for problem in self.problems] or [f"problem  none: {sound}"]
        return "\n".join(lines)


def inspect_folder(folder: Path | str, verify: bool = False) -> Inspection:
    """Inspect a checkpoint folder or hub model. Broken folders give problems, not errors.

    No weight is read, unless `verify` has every float looked at and checksums compared, where the folder keeps any.
    """
    found = Inspection(str(folder), kernels=kernel_path())
    with _noting(found):
        folder = resolve_folder(folder)
        raw = read_config(folder)
        found.model = next(iter(raw.get("architectures") or []), raw.get("model_type"))
        found.dtype = raw.get("dtype") or raw.get("torch_dtype")
        headers: dict[str, TensorHeader] = {}
        metadata = None
        with _noting(found):
            metadata = CheckpointMetadata.from_config(raw)
        with _noting(found):
            headers = read_headers(checkpoint_files(folder))
        if metadata is not None:
            found.scheme = str(metadata.scheme) + ("+" if metadata.layers else "")
            found.published = "quantization_config" not in raw
        found.total_bytes = sum(header.nbytes for header in headers.values())
        found.layers = _rows(headers, found.dtype)
        if not found.problems:
            found.problems += _load_problems(folder, metadata, headers)
        if verify:
            found.problems += _value_problems(headers)
            with _noting(found):
                differing = checksum_problems(folder)
                found.checksums = differing is not None
                found.problems += differing or []
            found.verified = not found.problems
    return found


@contextmanager
def _noting(found: Inspection) -> Iterator[None]:
    """Turn a failure inside the block into a problem of `found`."""
    try:
        yield
    except BadInput as error:
        found.problems.append(str(error))
    except Exception as error:  # damage that no check foresaw is a finding too, not a crash
        found.problems.append(f"reading it failed with {type(error).__name__}: {error}")


def _rows(headers: dict[str, TensorHeader], dtype: str | None) -> list[LayerRow]:
    """Rows of the layers whose stored shapes make sense on their own."""
    rows, gpu = [], torch.cuda.is_available()
    run_in = torch.float32 if dtype == "float32" else torch.float16
    for name in quantized_names(headers):
        parts = [headers.get(f"{name}.{part}") for part in PARTS]
        shapes = [part.shape for part in parts if part is not None]
        if [len(shape) for shape in shapes] != [3, 3, 2]:
            continue
        (m, words, out_features), (_, _, v), (groups, _) = shapes
        in_features = words * CODES_PER_WORD * v
        stored = [headers[key] for key in (f"{name}.{part}" for part in (*PARTS, "bias")) if key in headers]
        try:
            scheme = CodebookScheme(m, v, -1 if groups == 1 else in_features // max(groups, 1))
            scheme.check_matrix(out_features, in_features, name)
        except BadInput:
            continue  # the comparison with the module tree names the fault
        slow = why_general(run_in, out_features, words, groups) if gpu else None
        rows.append(LayerRow(name, out_features, in_features, scheme, sum(header.nbytes for header in stored), slow))
    return rows


def _value_problems(headers: dict[str, TensorHeader]) -> list[str]:
    """Tensors that hold NaN or inf. Reads them all."""
    problems = []
    floats = {name: header for name, header in headers.items() if header.dtype.startswith(("F", "BF"))}
    for name, header in tqdm(floats.items(), desc="verify", unit="tensor", dynamic_ncols=True):
        with safe_open(header.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            problems.append(f"{name} in {header.file.name} holds {bad} NaN or inf of {tensor.numel()} numbers")
    return problems


def _load_problems(folder: Path, metadata: CheckpointMetadata | None, headers: dict[str, TensorHeader]) -> list[str]:
    """What the loader would refuse, all of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from codegemm_runtime.experts import unfuse_experts
    from codegemm_runtime.replace import replace_linears
    from codegemm_runtime.verification import match_layers, match_tensors

    model = build_on_meta(model_config(folder))
    conversions = get_model_conversion_mapping(model)
    problems: list[str] = []
    if metadata is not None:
        unfuse_experts(model, headers)
        schemes, problems = match_layers(model, metadata, headers, conversions)
        replace_linears(model, schemes)
        if not quantized_names(headers):
            problems.append("config.json says the model is quantized, but no codes are stored")
    elif quantized_names(headers):
        problems.append("codes are stored, but config.json has neither our quantization_config nor a codegemm block")
    # A layer refused above is still dense in the tree, so its weight counts as missing: one sentence is enough.
    refused = [name for name in quantized_names(headers) if any(problem.startswith(name) for problem in problems)]
    return problems + [
        problem
        for problem in match_tensors(model, headers, conversions)
        if not problem.startswith(tuple(f"{name}." for name in refused))
    ]


def kernel_path() -> str:
    """The kernels this machine would use."""
    try:
        from codegemm_kernels import ops
    except ImportError as error:
        return f"none: the compiled module cannot be imported ({error})"
    instructions, has_cuda = ops.available_kernels()
    cpu = f"cpu ({instructions})"
    if not torch.cuda.is_available():
        return f"{cpu}; no GPU found"
    name = torch.cuda.get_device_name()
    return f"cuda ({name}); {cpu}" if has_cuda else f"{cpu}; built without CUDA kernels, so {name} stays unused"
