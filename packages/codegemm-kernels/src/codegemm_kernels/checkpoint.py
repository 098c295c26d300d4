"""A checkpoint folder before any weight is used: its metadata, its safetensors headers and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.scheme import CODEBOOK_BITS, CodebookScheme
from codegemm_kernels.untrusted import MAX_JSON_BYTES, check_config, check_links, parse_entries, read_json

QUANT_METHOD = "codegemm"
FORMAT_VERSION = 1
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PARTS = ("codes", "codebooks", "scales")
_FLOATS = ("F16", "BF16", "F32")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    """The safetensors name of the dtype: `I32`, `F16`, `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    nbytes: int
    file: Path


@dataclass(frozen=True)
class CheckpointMetadata:
    """The part of config.json that is ours."""

    scheme: CodebookScheme
    """Scheme of every quantised layer that has no override."""
    layers: Mapping[str, CodebookScheme] = field(default_factory=dict)
    """Overrides by module name."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Names of linear modules that stay dense."""

    def scheme_of(self, name: str) -> CodebookScheme:
        """Scheme of the module `name`."""
        return self.layers.get(name, self.scheme)

    def to_quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` object of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "scheme": str(self.scheme),
            "layers": {name: str(scheme) for name, scheme in sorted(self.layers.items())},
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    def to_published_block(self, module_names: Iterable[str]) -> dict[str, Any] | None:
        """The `codegemm` object the published system reads, or None when the layers are not uniform.

        `module_names` are full names such as `model.layers.0.self_attn.q_proj`; the block wants them relative to
        the decoder layer, with the container's name beside.
        """
        if self.layers:
            return None
        split = [name.split(".") for name in module_names]
        at = next((next((i for i, part in enumerate(parts) if part.isdigit()), 0) for parts in split), 0)
        if at < 2:
            return None
        relative = list(dict.fromkeys(".".join(parts[at + 1 :]) for parts in split))
        return {
            "arch_config": {
                "layers_name": split[0][at - 1],
                "model_name": ".".join(split[0][: at - 1]),
                "module_names": relative,
            },
            "group_size": self.scheme.group_size,
            "vec_len": self.scheme.vector_length,
            "num_codebooks": self.scheme.num_codebooks,
            "nbits_per_codebook": CODEBOOK_BITS,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CheckpointMetadata | None:
        """Read our `quantization_config`, or else the published `codegemm` block; None when there is neither.

        Raises CheckpointError when a block is there and cannot be understood.
        """
        ours = config.get("quantization_config")
        if isinstance(ours, Mapping) and ours.get("quant_method") == QUANT_METHOD:
            return cls.from_quantization_config(ours)
        if isinstance(ours, Mapping):
            return None
        published = config.get("codegemm")
        if not isinstance(published, Mapping):
            return None
        keys = ("nbits_per_codebook", "num_codebooks", "vec_len", "group_size")
        wrong = next((key for key in keys if type(published.get(key)) is not int), None)
        if wrong is not None:
            raise CheckpointError(f"the codegemm block of config.json lacks or garbles {wrong!r}")
        bits, *scheme = (published[key] for key in keys)
        if bits != CODEBOOK_BITS:
            raise CheckpointError(f"config.json declares {bits}-bit codes, but only {CODEBOOK_BITS}-bit ones are read")
        try:
            return cls(CodebookScheme(*scheme))
        except BadInput as error:
            raise CheckpointError(f"the codegemm block of config.json is not usable: {error}") from error

    @classmethod
    def from_quantization_config(cls, block: Mapping[str, Any]) -> CheckpointMetadata:
        """Read the `quantization_config` object written by `to_quantization_config`."""
        version = block.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format_version {version}, this release reads {FORMAT_VERSION}: upgrade it"
            )
        dense = block.get("modules_to_not_convert") or []
        if not isinstance(dense, list | tuple) or not all(isinstance(name, str) for name in dense):
            raise CheckpointError(
                "modules_to_not_convert in the quantization_config of config.json is no list of names"
            )
        try:
            return cls(
                CodebookScheme.parse(block["scheme"]),
                {name: CodebookScheme.parse(text) for name, text in (block.get("layers") or {}).items()},
                tuple(dense),
            )
        except (KeyError, TypeError, AttributeError, BadInput) as error:
            raise CheckpointError(f"the quantization_config of config.json is not usable: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError when there is none or it is no JSON object.

    Also for what nobody should load: see `untrusted`, and an adapter, which transformers would load unasked.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give a checkpoint folder with config.json and safetensors files")
    check_links(folder)
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    check_config(config, path)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter beside the model (adapter_config.json): move it to a folder of its own"
        )
    return config


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, through its index when it is sharded. Raises CheckpointError."""
    check_links(folder)
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({error!r})") from error
        for name in names:
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{index} names {name!r}, which is no file of its folder: get the index again")
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: download or write the checkpoint again")
    return files


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Headers of every tensor in safetensors `files`, without reading a weight.

    Raises CheckpointError for a file that is not safetensors or is shorter than its header says.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        headers.update(_read_header(file))
    return headers


def _read_header(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"{file} is cut short or no safetensors file: download or write it again")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MAX_JSON_BYTES):
            raise CheckpointError(f"{file} is cut short or no safetensors file: download or write it again")
        text = stream.read(length)
    try:
        entries = parse_entries(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error})") from error
    needed = 8 + length + sum(nbytes for _, _, nbytes in entries.values())
    if needed != size:
        raise CheckpointError(f"{file} holds {size} bytes where its header needs {needed}: it is cut short")
    return {name: TensorHeader(dtype, shape, nbytes, file) for name, (dtype, shape, nbytes) in entries.items()}


def quantized_names(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Names of the modules stored as codes, in stored order."""
    return [name.removesuffix(".codes") for name in headers if name.endswith(".codes")]


def check_layer(
    name: str, scheme: CodebookScheme, out_features: int, in_features: int, headers: Mapping[str, TensorHeader]
) -> list[str]:
    """Everything wrong with the stored tensors of one quantised layer, one sentence each; empty when all is well."""
    try:
        scheme.check_matrix(out_features, in_features, name)
    except BadInput as error:
        return [str(error)]
    shapes = scheme.shapes(out_features, in_features)
    problems = []
    for part in PARTS:
        header = headers.get(f"{name}.{part}")
        dtypes = ("I32",) if part == "codes" else _FLOATS
        if header is None:
            problems.append(f"{name}.{part} is missing")
        elif header.shape != shapes[part]:
            problems.append(
                f"{name}.{part} in {header.file.name} has shape {list(header.shape)}, "
                f"but {scheme} of a {out_features} x {in_features} layer needs {list(shapes[part])}"
            )
        elif header.dtype not in dtypes:
            problems.append(f"{name}.{part} in {header.file.name} is {header.dtype}, not {' or '.join(dtypes)}")
    return problems
