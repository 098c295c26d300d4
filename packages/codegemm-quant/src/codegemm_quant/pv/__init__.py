"""PV-tuning: train the codes, codebooks, scales and everything else of a quantised model against the dense one."""
