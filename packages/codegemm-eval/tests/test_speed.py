from __future__ import annotations

import pytest

from codegemm_eval.speed import SpeedSetting, measure_speed


def test_every_run_makes_all_tokens(model, tokenizer, monkeypatch):
    from codegemm_runtime import generation

    runs = []
    generate = generation.generate_text

    def counting(*arguments, **options):
        runs.append(generate(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(generation, "generate_text", counting)
    model.generation_config.eos_token_id = list(range(258))  # any token would end the text
    speed = measure_speed(model, tokenizer, SpeedSetting(prompt_tokens=5, new_tokens=4, runs=3))
    assert [run.tokens for run in runs] == [4] * 4
    rates = sorted(4 / run.seconds for run in runs[1:])
    assert (speed.slowest, speed.tokens_per_second, speed.fastest) == pytest.approx(tuple(rates))
    assert 0 < speed.time_to_first_token < 4 / speed.slowest
    assert model.generation_config.eos_token_id == list(range(258))
