"""LoRA adapters of PEFT on quantised layers. The only module that needs peft, which is not a dependency.

config = with_codebook_layers(LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model = get_peft_model(load_model(folder), config)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from codegemm_kernels.errors import BadInput
from codegemm_runtime.linear import CodebookLinear


def with_codebook_layers(config: LoraConfig) -> LoraConfig:
    """Let PEFT put adapters on CodebookLinear; returns `config`.

    PEFT does not store this, so a saved adapter is loaded with `PeftModel.from_pretrained(model, folder,
    config=with_codebook_layers(LoraConfig.from_pretrained(folder)))`.
    """
    config._register_custom_module({CodebookLinear: CodebookLoraLinear})
    return config


class CodebookLoraLinear(nn.Module, LoraLayer):
    """`base_layer(x) + scaling * B A dropout(x)`, with the codes below frozen (Hu et al. 2021)."""

    def __init__(
        self, base_layer: CodebookLinear, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        """Raises BadInput for the variants of LoRA that compute with the weight itself."""
        if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
            raise BadInput(
                "quantised layers take plain LoRA only, as DoRA, PiSSA and the like compute with the weight: "
                "leave use_dora and init_lora_weights as they are"
            )
        super().__init__()
        with warnings.catch_warnings():  # it knows the layers that PEFT comes with, and guesses the sizes of ours right
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        update: Any = self.update_layer
        update(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: CodebookLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.codebooks.device, base_layer.codebooks.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] to [..., out_features], in the dtype of the base layer's result."""
        layer: Any = self  # PEFT's dictionaries of modules have no types
        y: Tensor = layer.get_base_layer()(x)
        for name in [] if layer.disable_adapters else layer.active_adapters:
            if name in layer.lora_A:
                down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
                inner = x if torch.is_autocast_enabled(x.device.type) else x.to(down.weight.dtype)
                y = y + (up(down(dropout(inner))) * layer.scaling[name]).to(y.dtype)
        return y

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises BadInput: a sum of codes and an adapter has no codes."""
        raise BadInput("an adapter cannot be merged into codes: keep it beside, or merge after model.dequantize()")
