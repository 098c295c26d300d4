"""The conversion itself: one tensor or layer at a time from a source to a folder written beside and renamed."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codegemm_kernels.checksums import write_checksums
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.model_card import write_model_card
from codegemm_kernels.scheme import CodebookScheme
from codegemm_runtime.convert import aqlm
from codegemm_runtime.convert.matrix import PackedMatrix
from codegemm_runtime.convert.source import Source, open_folder, open_source
from codegemm_runtime.convert.writer import FolderWriter
from codegemm_runtime.experts import PARTS as EXPERT_PARTS
from codegemm_runtime.inspection import inspect_folder
from codegemm_runtime.loading import COMPANION_FILES, build_on_meta, model_config

Format = Literal["codegemm", "aqlm", "dense"]
_EXPERT = re.compile(rf"(?P<module>.+)\.(?P<number>\d+)\.(?P<part>{'|'.join(EXPERT_PARTS)})")
_Encode = Callable[[PackedMatrix], dict[str, Tensor]]


def convert_folder(
    folder: Path | str,
    out: Path,
    to: Format = "codegemm",
    dtype: torch.dtype | None = None,
    base: Path | str | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Write `folder` in another format to the new folder `out`; returns the JSON object of `codegemm-runtime convert`.

    Codes keep their bits, and so do floats stored in `dtype`. `dtype` None is the one that the source declares, which
    is what a loader casts to. `base` and `allow_pickle`: see `open_source`. Raises BadInput or CheckpointError, and
    then leaves nothing behind.
    """
    scratch = out.with_name(f".{out.name}.layers")
    with FolderWriter(out) as writer, open_source(folder, base, allow_pickle, scratch) as source:
        if to == source.format:
            raise BadInput(f"{folder} is {to} already: there is nothing to convert")
        encode, block = _encoder(source, to)
        wanted = dtype or getattr(torch, source.declared_dtype)
        _write_tensors(source, writer, encode, wanted)
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        building = writer.finish(config | {"dtype": str(wanted).removeprefix("torch.")} | block)
        _copy_companions(source.companions, building)
        if to == "codegemm" and source.metadata is not None:
            write_model_card(building, out.name, str(source.companions))
        _check_written(building, to)
        write_checksums(building)
        writer.publish()
    return _summary(source, to, out, writer.total_bytes)


def _encoder(source: Source, to: Format) -> tuple[_Encode, dict[str, Any]]:
    """What becomes of a packed layer, and what config.json says of it. Raises BadInput for a layer `to` cannot hold."""
    if to == "aqlm":
        linears = _linear_names(source.companions)
        coded = set(source.layers)
        block = aqlm.to_config(_aqlm_scheme(source), [name for name in linears if name not in coded])
        return (lambda matrix: matrix.to_additive()._asdict()), {"quantization_config": block}
    if to == "dense" or source.metadata is None:
        return (lambda matrix: {"weight": matrix.dequantize()}), {}
    blocks = {"quantization_config": source.metadata.to_quantization_config()}
    published = source.metadata.to_published_block(name for name in source.layers if name not in source.reasons)
    return PackedMatrix._asdict, blocks if published is None else blocks | {"codegemm": published}


def _aqlm_scheme(source: Source) -> CodebookScheme:
    """The scheme of all layers, as AQLM has one a model and one scale a row. Raises BadInput naming a layer."""
    if source.metadata is None or source.reasons:
        raise BadInput(f"this cannot be exported to aqlm: {next(iter(source.reasons.values()))}")
    expert = next(iter(_expert_places(source.layers)), None)
    if expert is not None:
        raise BadInput(f"{expert} is an expert's, and aqlm has no mixtures of experts: export with --to dense")
    scheme = source.metadata.scheme_of(source.layers[0])
    for name in tqdm(source.layers, desc="check layers", unit="layer", dynamic_ncols=True):
        own = source.metadata.scheme_of(name)
        if (own.num_codebooks, own.vector_length) != (scheme.num_codebooks, scheme.vector_length):
            raise BadInput(
                f"{name} has scheme {own} and {source.layers[0]} has {scheme}, but aqlm has one for all layers: "
                "export with --to dense"
            )
        scales = source.tensor(f"{name}.scales")
        scales = scales if source.packed else scales.flatten(1).t()
        if not bool((scales == scales[:1]).all()):
            raise BadInput(
                f"{name} has {scales.shape[0]} scales a row ({own}), but aqlm has one: export with --to dense, "
                "or quantize with a group size of -1"
            )
    return scheme


def _linear_names(folder: Path) -> list[str]:
    model = build_on_meta(model_config(folder))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _write_tensors(source: Source, writer: FolderWriter, encode: _Encode, dtype: torch.dtype) -> None:
    dense, layers = source.dense_names(), source.layers
    experts, fused = _expert_places(layers), dict[str, dict[int, Tensor]]()
    with tqdm(total=len(dense) + len(layers), desc="convert", unit="tensor", dynamic_ncols=True) as progress:
        for name in dense:
            writer.add(name, _cast(source.tensor(name), name, dtype))
            progress.update()
        for name in layers:
            matrix = source.matrix(name)
            if isinstance(matrix, PackedMatrix):
                books = _cast(matrix.codebooks, f"{name}.codebooks", dtype)
                scales = _cast(matrix.scales, f"{name}.scales", dtype)
                stored = encode(PackedMatrix(matrix.codes, books, scales))
            else:
                stored = {"weight": matrix.dequantize()}
            for part, tensor in stored.items():
                cast = _cast(tensor, f"{name}.{part}", dtype)
                if part == "weight" and name in experts:
                    _add_expert(writer, fused, experts[name], cast)
                else:
                    writer.add(f"{name}.{part}", cast)
            progress.update()


class _Place(NamedTuple):
    """Where the weight of an expert goes in a dense model, which has those of all experts in one tensor."""

    fused: str
    number: int
    total: int


def _expert_places(layers: list[str]) -> dict[str, _Place]:
    """Places of the layers that were taken out of fused experts modules (`experts.py`)."""
    found = {name: match for name in layers if (match := _EXPERT.fullmatch(name))}
    counts = Counter((match["module"], match["part"]) for match in found.values())
    return {
        name: _Place(f"{match['module']}.{match['part']}", int(match["number"]), counts[match["module"], match["part"]])
        for name, match in found.items()
        if (match["module"], EXPERT_PARTS[0])
        in counts  # elsewhere the names are those of a model with separate experts
    }


def _add_expert(writer: FolderWriter, fused: dict[str, dict[int, Tensor]], place: _Place, weight: Tensor) -> None:
    """Keep the weight of an expert until all of its module are there, then write them as one."""
    weights = fused.setdefault(place.fused, {})
    weights[place.number] = weight
    if len(weights) == place.total:
        writer.add(place.fused, torch.stack([weights[i] for i in sorted(weights)]))
        del fused[place.fused]


def _cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A float tensor in `dtype`, any other as it is. Raises CheckpointError for NaN and inf, BadInput for overflow."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} holds NaN or inf: get the checkpoint again")
        raise BadInput(f"{name} has values that {dtype} cannot hold: give --dtype bfloat16 or float32")
    return cast


def _copy_companions(folder: Path, into: Path) -> None:
    """Tokenizer, generation settings and the like; nothing that describes the weights."""
    for pattern in COMPANION_FILES:
        for file in folder.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json") and not (into / file.name).exists():
                shutil.copy(file, into)


def _check_written(building: Path, to: Format) -> None:
    """Raise CheckpointError unless the new folder would load: the source may lack a tensor or hold one too many."""
    if to == "aqlm":
        open_folder(building)
        return
    problems = inspect_folder(building).problems
    if problems:
        raise CheckpointError(f"the source makes no complete model, so nothing is written: {problems[0]}")


def _summary(source: Source, to: Format, out: Path, total_bytes: int) -> dict[str, Any]:
    reasons = list(source.reasons.values())
    if reasons:
        more = f" ({len(reasons) - 1} more)" if len(reasons) > 1 else ""
        print(f"stored as dense weights: {reasons[0]}{more}", file=sys.stderr)
    scheme = source.metadata.scheme if source.metadata is not None and to != "dense" else None
    dense = f"codegemm-quant quantize {out} --data TEXT --scheme m2v8g128 --out {out}-m2v8g128"
    if scheme is None:
        print(f"a dense model; to compress it: {dense}", file=sys.stderr)
    return {
        "from": source.format,
        "to": to if scheme is not None else "dense",
        "out": str(out),
        "scheme": None if scheme is None else str(scheme),
        "layers": len(source.layers) - len(reasons) if scheme is not None else 0,
        "dense_layers": [] if to == "dense" else [*source.reasons],
        "bytes": total_bytes,
    }
