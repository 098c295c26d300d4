"""codegemm_eval."""
