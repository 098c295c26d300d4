"""The transformers integration: how `from_pretrained` and `save_pretrained` handle our checkpoints."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from codegemm_kernels.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointMetadata,
    TensorHeader,
    quantized_names,
    read_headers,
)
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.untrusted import check_links

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# This module runs inside `import transformers`. Whatever needs the compiled kernels is imported by the hooks, so that
# a broken build is reported by the load that needs it and not swallowed at registration.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CodeGemmConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json. Fields that this release does not know survive a round trip."""

    def __init__(
        self,
        scheme: str,
        layers: dict[str, str] | None = None,
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        """Raises CheckpointError when the scheme or a layer's scheme cannot be understood."""
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.scheme = scheme
        self.layers = layers or {}
        self.modules_to_not_convert = modules_to_not_convert or []
        for name, value in unknown.items():
            if hasattr(type(self), name):  # a method, which transformers would call
                raise CheckpointError(f"the quantization_config of config.json has the field {name}, which cannot be")
            setattr(self, name, value)
        self.metadata()

    def metadata(self) -> CheckpointMetadata:
        """The same in the terms of codegemm_kernels."""
        return CheckpointMetadata.from_quantization_config(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return copy.deepcopy(self.__dict__)


class CodeGemmQuantizer(HfQuantizer):
    """Swaps in CodebookLinear for every module stored as codes, and refuses a checkpoint that does not fit the model.

    The modules come from the safetensors headers, not from lists of names in config.json.
    """

    requires_calibration = True

    def __init__(self, quantization_config: CodeGemmConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise BadInput(
                "from_pretrained cannot quantize to codegemm codes: run codegemm-quant first, or, for a folder with "
                "only a codegemm block in config.json, use codegemm_runtime.load_model or `codegemm-runtime convert`"
            )
        super().__init__(quantization_config, **kwargs)
        self._metadata = quantization_config.metadata()
        self._model: PreTrainedModel | None = None
        self._headers: dict[str, TensorHeader] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype asked for, if there are kernels for it."""
        if dtype not in DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
            raise BadInput(f"codegemm models run in {names}, not in {dtype}: choose one of them as dtype")
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        from transformers.conversion_mapping import get_model_conversion_mapping

        from codegemm_runtime.experts import unfuse_experts
        from codegemm_runtime.replace import replace_linears
        from codegemm_runtime.verification import match_layers

        parallel = getattr(model.config, "distributed_config", None)
        if parallel is not None and (parallel.tp_size or 1) > 1:
            raise BadInput(
                "transformers cannot cut codes for tensor parallelism: use "
                "codegemm_runtime.tensor_parallel.load_tensor_parallel, vLLM, or device_map"
            )
        files = [Path(file) for file in checkpoint_files or []]
        foreign = next((file for file in files if file.suffix != ".safetensors"), None)
        if not files or foreign is not None:
            raise CheckpointError(
                f"codegemm weights are read from safetensors files only, not from {foreign or 'memory'}"
            )
        check_links(files[0].parent)
        outside = next((file for file in files if file.parent != files[0].parent or ".." in file.parts), None)
        if outside is not None:
            raise CheckpointError(f"the index names {outside}, which is no file of its folder: get the index again")
        headers = read_headers(files)
        if not quantized_names(headers):
            raise CheckpointError(
                f"{files[0].parent} holds no codes, though its config.json says it is quantized: "
                "write the checkpoint again or remove quantization_config"
            )
        unfuse_experts(model, headers)
        schemes, problems = match_layers(model, self._metadata, headers, get_model_conversion_mapping(model))
        raise_problems(problems, headers)
        replace_linears(model, schemes)
        self._model, self._headers = model, headers
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Check every stored tensor, now that the list of conversions transformers loads with is known."""
        from codegemm_runtime.verification import match_tensors

        if self._model is not None:
            raise_problems(match_tensors(self._model, self._headers, weight_conversions), self._headers)
            self._model = None
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from codegemm_runtime.linear import CodebookLinear, tile_linears

        if self._model is not None:
            raise RuntimeError("this transformers did not ask for weight conversions, so no tensor was checked")
        for module in model.modules():
            if isinstance(module, CodebookLinear):
                module.requires_grad_(False)  # the loader lets every floating tensor require a gradient
        # transformers 5.17 leaves a tensor that it renamed (such as all of a base model's) in the dtype of its file.
        in_fp32 = "|".join(model._get_dtype_plan(model.config.dtype))
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            kept = in_fp32 and re.search(in_fp32, name)
            if parameter.dtype != wanted and parameter.device.type != "meta" and not kept:
                parameter.data = parameter.data.to(wanted)
        raise_problems(_not_finite(model, self._headers), self._headers)
        tile_linears(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from codegemm_runtime.replace import restore_linears

        restore_linears(model, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """state_dict is the stored layout, so save_pretrained always works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the quantised layers; they stay frozen themselves until they are unfrozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops are registered with shapes and dtypes, so torch.compile sees no graph break."""
        return True


def _not_finite(model: PreTrainedModel, headers: dict[str, TensorHeader]) -> list[str]:
    """Codebooks and scales that hold NaN or inf. Those that stay on disk are not looked at."""
    from codegemm_runtime.linear import CodebookLinear

    problems = []
    for layer, module in model.named_modules():
        if not isinstance(module, CodebookLinear):
            continue
        for part in ("codebooks", "scales"):
            tensor: torch.Tensor = getattr(module, part)
            if tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
                name = f"{layer}.{part}"
                # Stored names may have a prefix that the model's lack, or the other way round.
                files = (header.file for key, header in headers.items() if key.endswith(name) or name.endswith(key))
                problems.append(f"{name} in {next(files, Path('its file')).name} holds NaN or inf")
    return problems


def raise_problems(problems: list[str], headers: dict[str, TensorHeader]) -> None:
    """Raise CheckpointError for the first of `problems`, with the folder it is in and the number of others."""
    if not problems:
        return
    folders: Iterable[Path] = (header.file.parent for header in headers.values())
    folder = next(iter(folders), Path())
    more = f" ({len(problems) - 1} more: see codegemm-runtime inspect)" if len(problems) > 1 else ""
    raise CheckpointError(f"{folder}: {problems[0]}{more}; get or write the checkpoint again")


def register() -> None:
    """Tell transformers about the `codegemm` method. Idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(CodeGemmConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(CodeGemmQuantizer)


register()
