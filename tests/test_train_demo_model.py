"""The training script, on a model of a few thousand parameters."""

from __future__ import annotations

import dataclasses
import math

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from codegemm_kernels import BadInput


@pytest.fixture
def small(train_demo_model, tmp_path):
    return train_demo_model.Training(
        out=tmp_path / "model",
        vocabulary=300,
        hidden_size=32,
        intermediate_size=64,
        layers=1,
        heads=2,
        key_value_heads=1,
        context=32,
        batch_size=4,
        steps=24,
        learning_rate=0.03,
        warmup=5,
        validation_percent=20,
        megabytes=0.1,
        save_every=8,
        device="cpu",
    )


def test_loss_falls_and_a_killed_run_continues_to_the_same_model(train_demo_model, small, monkeypatch):
    whole = train_demo_model.train(dataclasses.replace(small, out=small.out.with_name("whole")))
    assert whole["first_loss"] == pytest.approx(math.log(300), rel=0.05)  # it starts by knowing nothing
    assert whole["loss"] < whole["first_loss"] - 0.5
    assert whole["perplexity"] < 300 * 0.7

    check = train_demo_model.finite

    def killed(loss, step):
        if step == 18:
            raise KeyboardInterrupt
        return check(loss, step)

    monkeypatch.setattr(train_demo_model, "finite", killed)
    with pytest.raises(KeyboardInterrupt):
        train_demo_model.train(small)
    assert not small.out.exists()
    with pytest.raises(BadInput, match="other settings"):
        train_demo_model.train(dataclasses.replace(small, seed=1))
    monkeypatch.setattr(train_demo_model, "finite", check)
    resumed = train_demo_model.train(small)
    for key in ("first_loss", "loss", "perplexity", "text_sha256"):
        assert resumed[key] == whole[key]
    assert sorted(path.name for path in small.out.parent.iterdir()) == ["model", "whole"]

    model = AutoModelForCausalLM.from_pretrained(small.out, dtype="auto")
    assert AutoTokenizer.from_pretrained(small.out)("def f():").input_ids
    assert sum(p.numel() for p in model.parameters()) == resumed["parameters"]
    with pytest.raises(BadInput, match="exists already"):
        train_demo_model.train(small)


def test_modules_are_disjoint_and_the_split_is_stable(train_demo_model, small):
    training, validation = train_demo_model.split_modules(small)
    assert training
    assert validation
    assert not set(training) & set(validation)
    assert (training, validation) == train_demo_model.split_modules(small)


def test_nothing_held_out_is_refused(train_demo_model, small):
    with pytest.raises(BadInput, match="validation-percent"):
        train_demo_model.train(dataclasses.replace(small, validation_percent=0))


def test_learning_rate_rises_and_falls_to_a_tenth(train_demo_model, small):
    rates = [train_demo_model.learning_rate(small, step) for step in range(small.steps + 1)]
    assert rates[0] == pytest.approx(small.learning_rate / small.warmup)
    assert max(rates) == pytest.approx(small.learning_rate)
    assert rates[-1] == pytest.approx(small.learning_rate / 10)
