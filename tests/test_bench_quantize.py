"""tools/bench_quantize.py and tools/quantize_curve.py on shapes that take seconds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from codegemm_kernels import BadInput
from codegemm_quant.config import EFFORT


def test_stages_make_up_the_time(bench_quantize, tmp_path):
    path = tmp_path / "bench.json"
    command = bench_quantize.Bench(
        "tiny", 2, path, "m1v4g32", windows=8, length=32, rounds=1, tune_epochs=1, device="cpu"
    )
    result = bench_quantize.bench(command)
    assert json.loads(path.read_text()) == result
    assert (result["blocks"], result["tokens"]) == (2, 256)
    assert {"forward", "statistics", "fit", "block tuning", "save"} == set(result["stages"])
    assert 0.5 * result["seconds_per_block"] < sum(result["stages"].values()) < 1.05 * result["seconds_per_block"]
    assert result["peak_host_gb"] > 0.05
    assert [len(report["layers"]) for report in result["reports"]] == [7, 7]
    assert all(0 < report["error"] < 0.5 for report in result["reports"])


def test_what_it_cannot_time_is_refused(bench_quantize):
    with pytest.raises(BadInput, match=r"unknown shape 'gpt'.*tiny"):
        bench_quantize.bench(bench_quantize.Bench("gpt"))
    with pytest.raises(BadInput, match="multiple of 8"):
        bench_quantize.bench(bench_quantize.Bench("tiny", windows=9))
    with pytest.raises(BadInput, match="no multiple of the group size"):
        bench_quantize.bench(bench_quantize.Bench("tiny", scheme="m1v4g128"))


def test_a_curve_has_a_point_for_each_scheme(quantize_curve, root, tmp_path):
    bundled, text = root / "models" / "pylm-4m", tmp_path / "text.txt"
    text.write_text((bundled / "validation.txt").read_text()[:40_000])
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4096, **shape), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(bundled).save_pretrained(tmp_path / "tiny")
    path, schemes = tmp_path / "curve.json", ("m1v8g-1", "m1v4g-1")
    result = quantize_curve.curve(
        quantize_curve.Curve(str(tmp_path / "tiny"), str(text), str(text), path, schemes, 32, 32, 8, "cpu", (7.9,))
    )
    assert json.loads(path.read_text()) == result
    assert [row["scheme"] for row in result["rows"]] == [*schemes, "mixed"]
    for row in result["rows"]:
        assert row["gap"] == pytest.approx(math.log(row["perplexity"] / result["dense_perplexity"]))
        assert row["effort"]["samples"] == EFFORT["cpu"].samples
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
