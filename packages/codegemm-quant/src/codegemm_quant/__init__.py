"""codegemm_quant."""
