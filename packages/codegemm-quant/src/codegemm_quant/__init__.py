"""Compress language models to codebook indices: calibrated post-training quantisation."""

from codegemm_quant.config import QuantizeConfig
from codegemm_quant.ptq import quantize

__all__ = ["QuantizeConfig", "quantize"]
