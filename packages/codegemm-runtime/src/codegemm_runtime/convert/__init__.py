"""Other tools' checkpoints to ours, and ours to AQLM or dense weights: `codegemm-runtime convert`."""
