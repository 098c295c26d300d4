"""The `vllm.general_plugins` entry point: vLLM calls it in each of its processes, before it looks at a model.

Nothing of vLLM is imported until then, and nothing here needs it to be installed.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantisation method `codegemm`. Idempotent, as vLLM may call it several times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from codegemm_kernels.checkpoint import QUANT_METHOD
    from codegemm_runtime.vllm_linear import CodebookQuantization

    register_quantization_config(QUANT_METHOD)(CodebookQuantization)
