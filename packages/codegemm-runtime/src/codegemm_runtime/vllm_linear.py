"""Quantised linear layers inside vLLM: how its fused and sharded layers are loaded from a checkpoint and multiplied.

vLLM joins q, k and v, or gate and up, into one layer. Each was quantised on its own, so such a layer holds several
stored matrices, each with its codebooks, and one `gemm_grouped` multiplies by all of them. What is stored as codes is
read from the safetensors headers; vLLM itself would go on with uninitialised weights where a tensor is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from codegemm_kernels import ops
from codegemm_kernels.checkpoint import (
    PARTS,
    QUANT_METHOD,
    CheckpointMetadata,
    TensorHeader,
    check_layer,
    checkpoint_files,
    read_headers,
)
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_runtime.sharding import MatrixShard

_PLACES: dict[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}
"""vLLM's names of the parts of a fused layer; those of gate and up are numbers already."""


class CodebookQuantization(QuantizationConfig):
    """vLLM's view of a codegemm checkpoint: which of its layers hold codes, by the headers of the checkpoint."""

    def __init__(self, metadata: CheckpointMetadata) -> None:
        super().__init__()
        self.metadata = metadata
        self.headers: dict[str, TensorHeader] = {}
        """Of every stored tensor, by its name in vLLM's module tree before anything is fused."""

    def get_name(self) -> str:
        """The name in `quantization_config.quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the kernels compute in."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest architecture the CUDA kernels are compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CodebookQuantization:
        """From the `quantization_config` of config.json. Raises CheckpointError when it cannot be understood."""
        return cls(CheckpointMetadata.from_quantization_config(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the safetensors headers of the folder or hub model. Raises CheckpointError when there are none."""
        folder = Path(model_name)
        if folder.is_dir():
            self.headers = read_headers(checkpoint_files(folder))
            return
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        found: Mapping[str, Any] = get_safetensors_params_metadata(model_name, revision=revision)
        if not found:
            raise CheckpointError(f"no safetensors headers of {model_name} could be read: download it and try again")
        self.headers = {
            name: TensorHeader(entry["dtype"], tuple(entry["shape"]), 0, folder) for name, entry in found.items()
        }

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that a vLLM model gives to the modules of its transformers counterpart."""
        renamed: dict[str, TensorHeader] = hf_to_vllm_mapper.apply_dict(self.headers)
        layers = {f"{name}.codes": scheme for name, scheme in self.metadata.layers.items()}
        renamed_layers = {
            name.removesuffix(".codes"): scheme for name, scheme in hf_to_vllm_mapper.apply_dict(layers).items()
        }
        self.headers = renamed
        self.metadata = CheckpointMetadata(self.metadata.scheme, renamed_layers, self.metadata.modules_to_not_convert)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer` multiplies: by codes, or by a dense weight. Raises BadInput for codes that have no place there.

        `prefix` is the layer's name in vLLM's module tree.
        """
        if not self.headers:
            raise CheckpointError("the headers of the checkpoint were not read: load it from a folder or hub name")
        if not isinstance(layer, LinearBase):
            self._refuse_codes(layer, prefix)
            return None
        names = self._stored_names(prefix)
        coded = [name for name in names if f"{name}.codes" in self.headers]
        if len(coded) == len(names):
            return CodebookLinearMethod(names, self)
        if coded:
            dense = ", ".join(name for name in names if name not in coded)
            raise BadInput(
                f"vLLM joins {', '.join(coded)}, stored as codes, with {dense}, which is dense: quantize all or none"
            )
        missing = next((name for name in names if f"{name}.weight" not in self.headers), None)
        if missing is not None:
            raise CheckpointError(f"{missing}.weight is missing, and there are no {missing}.codes")
        return UnquantizedLinearMethod()

    def _stored_names(self, prefix: str) -> list[str]:
        """Names under which the matrices of one vLLM layer are stored."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _refuse_codes(self, layer: nn.Module, prefix: str) -> None:
        found = next((n for n in self.headers if n.startswith(f"{prefix}.") and n.endswith(".codes")), None)
        if found is not None:
            raise BadInput(
                f"{found.removesuffix('.codes')} is stored as codes, which the {type(layer).__name__} of vLLM cannot "
                "hold: serve this checkpoint with transformers, or leave that module dense when quantizing"
            )


class CodebookLinearMethod(LinearMethodBase):
    """One vLLM layer: its stored matrices, of which this rank loads its share."""

    def __init__(self, names: list[str], config: CodebookQuantization) -> None:
        """`names` are those of the stored matrices, in the order of the layer's outputs."""
        self.names = names
        self.config = config
        self.shards: list[MatrixShard] = []
        self.loaded: dict[tuple[int, str], Tensor] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Check the stored matrices and register parameters that load them; they get their size when they are loaded.

        Sizes are vLLM's, those per partition of this rank. Raises CheckpointError for a stored tensor that does not
        fit, BadInput where the ranks cannot share a matrix.
        """
        several = len(self.names) > 1
        if several and len(self.names) != len(output_partition_sizes):
            raise BadInput(f"vLLM wants {len(output_partition_sizes)} matrices in place of {', '.join(self.names)}")
        for i, name in enumerate(self.names):
            local = output_partition_sizes[i : i + 1] if several else output_partition_sizes
            self.shards.append(self._shard(layer, name, local, (input_size_per_partition, input_size)))
        for part in PARTS:
            dtype = torch.int32 if part == "codes" else params_dtype
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            layer.register_parameter(part, parameter)
            set_weight_attrs(parameter, {"weight_loader": self._loader(part)})

    def _shard(self, layer: nn.Module, name: str, local: list[int], inputs: tuple[int, int]) -> MatrixShard:
        """This rank's share of one stored matrix: `local` outputs by part, `inputs` of this rank and of all."""
        codes = self.config.headers[f"{name}.codes"]
        if len(codes.shape) != 3:
            raise CheckpointError(f"{name}.codes in {codes.file.name} has shape {list(codes.shape)}, not three axes")
        scheme, stored = self.config.metadata.scheme_of(name), codes.shape[2]
        problems = check_layer(name, scheme, stored, inputs[1], self.config.headers)
        if problems:
            raise CheckpointError(f"{codes.file.parent}: {problems[0]}; get or write the checkpoint again")
        rank, ranks = int(layer.tp_rank), int(layer.tp_size)  # type: ignore[arg-type]
        if inputs[0] != inputs[1]:
            shard = MatrixShard.by_columns(name, scheme, (stored, inputs[1]), rank, ranks)
        else:
            # Heads of k and v are fewer than the ranks at times: neighbouring ranks then hold the same one.
            pieces = max(stored // sum(local), 1)
            parts = tuple(size * pieces for size in local)
            shard = MatrixShard.by_rows(name, scheme, (stored, inputs[1]), rank * pieces // ranks, pieces, parts)
        if shard.shape != (sum(local), inputs[0]):
            raise CheckpointError(f"{name} has {stored} outputs, of which the model takes {sum(local)} on a rank")
        return shard

    def _loader(self, part: str) -> Any:
        def load(parameter: nn.Parameter, tensor: Tensor, place: Any = None) -> None:
            matrix = _PLACES.get(place, place)
            if not isinstance(matrix, int) or matrix >= len(self.shards):
                raise BadInput(f"vLLM loads part {place!r} of {', '.join(self.names)}, which has no such part")
            own = self.shards[matrix].cut(part, tensor)
            self.loaded[matrix, part] = own.to(parameter.device, parameter.dtype, copy=True).contiguous()

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the loaded matrices in place. Raises CheckpointError for one that is missing or not finite."""
        for i, shard in enumerate(self.shards):
            self._check(shard.name, [self.loaded.get((i, part)) for part in PARTS], getattr(layer, "bias", None))
            codes, groups = self.loaded[i, "codes"], self.loaded[i, "scales"].shape[0]
            if codes.device.type == "cpu":  # into the order in which the CPU kernels read them
                self.loaded[i, "codes"] = ops.tile(codes, shard.scheme.vector_length, groups)
        for part in PARTS:
            delattr(layer, part)
            tensors = [self.loaded.pop((i, part)) for i in range(len(self.shards))]
            layer.register_module(part, nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors))

    def _check(self, name: str, tensors: list[Tensor | None], bias: Tensor | None) -> None:
        for part, tensor in zip(PARTS, tensors, strict=True):
            if tensor is None:
                raise CheckpointError(f"{name}.{part} is missing: get or write the checkpoint again")
            if part != "codes" and not bool(tensor.isfinite().all()):
                file = self.config.headers[f"{name}.{part}"].file.name
                raise CheckpointError(f"{name}.{part} in {file} holds NaN or inf: get or write the checkpoint again")
        stored = f"{name}.bias" in self.config.headers
        if stored != (bias is not None):
            fault = "would be ignored: that layer has no bias" if stored else "is missing"
            raise CheckpointError(f"{name}.bias {fault}; get or write the checkpoint again")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs] to [..., outputs of all matrices of the layer on this rank]."""
        codes, codebooks, scales = (list(getattr(layer, part)) for part in PARTS)
        if len(codes) == 1:
            y: Tensor = ops.gemm(x, codes[0], codebooks[0], scales[0], bias)
            return y
        sizes = [one.shape[-1] for one in scales]
        biases = [None] * len(codes) if bias is None else list(bias.split(sizes))
        return torch.cat(ops.gemm_grouped(x, codes, codebooks, scales, biases), dim=-1)
