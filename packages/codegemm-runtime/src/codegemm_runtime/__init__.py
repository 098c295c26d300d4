"""Load and run codebook-quantised language models through transformers.

Importing this package makes plain `AutoModelForCausalLM.from_pretrained` know the `codegemm` quantisation method. It
imports neither torch nor transformers: the names below load their module at first use.
"""

from importlib import import_module
from typing import Any

from codegemm_runtime.autoload import install

_HOMES = {
    "CodeGemmConfig": "hf",
    "CodeGemmQuantizer": "hf",
    "register": "hf",
    "CodebookLinear": "linear",
    "generate_text": "generation",
    "inspect_folder": "inspection",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "replace_linears": "replace",
}

__all__ = sorted(_HOMES)

install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
