"""codegemm_runtime."""
