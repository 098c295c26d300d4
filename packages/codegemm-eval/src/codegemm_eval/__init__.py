"""Judge language models, dense or stored as codes: perplexity, lm-eval tasks, tables and charts."""
