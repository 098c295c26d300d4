"""The decode engine: captured steps over a static cache, for the model families in `decoder.FAMILIES`."""

from codegemm_runtime.engine.decoder import Unsupported
from codegemm_runtime.engine.engine import Engine, Request
from codegemm_runtime.engine.sampling import Sampling
from codegemm_runtime.engine.text import TextStream

__all__ = ["Engine", "Request", "Sampling", "TextStream", "Unsupported"]
