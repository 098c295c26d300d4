"""Tokens a second of a model, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

PROMPT_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class SpeedSetting:
    """What is generated to measure speed."""

    prompt_tokens: int = 64
    """Tokens before the first new one, chosen at random."""
    new_tokens: int = 100
    """Tokens to generate, without ending at an end token."""
    runs: int = 5
    """Timed repetitions, after one that is not."""


@dataclass(frozen=True)
class Speed:
    """How fast a model generates; medians over the runs."""

    tokens_per_second: float
    """New tokens by the wall time of the whole call, prompt included."""
    slowest: float
    fastest: float
    time_to_first_token: float
    """Seconds."""


def measure_speed(model: Any, tokenizer: Any, setting: SpeedSetting) -> Speed:
    """Generate greedily with what codegemm-runtime takes for `model`, its engine or transformers."""
    from codegemm_runtime.generation import generate_text

    chooser = torch.Generator().manual_seed(PROMPT_SEED)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (1, setting.prompt_tokens), generator=chooser)
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        # The first call builds the engine and compiles.
        timed = [generate_text(model, tokenizer, prompt, setting.new_tokens) for _ in range(setting.runs + 1)][1:]
    finally:
        model.generation_config.eos_token_id = ends
    rates = [run.tokens / run.seconds for run in timed]
    first = median(run.time_to_first_token for run in timed)
    return Speed(median(rates), min(rates), max(rates), first)
