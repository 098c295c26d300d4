"""tools/bench_quantize.py and tools/quantize_curve.py on shapes that take seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from codegemm_kernels import BadInput
from codegemm_quant.config import EFFORT

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load("bench_quantize")


def test_stages_make_up_the_time(tool, tmp_path):
    path = tmp_path / "bench.json"
    command = tool.Bench("tiny", 2, path, "m1v4g32", windows=8, length=32, rounds=1, tune_epochs=1, device="cpu")
    result = tool.bench(command)
    assert json.loads(path.read_text()) == result
    assert (result["blocks"], result["tokens"]) == (2, 256)
    assert {"forward", "statistics", "fit", "block tuning", "save"} == set(result["stages"])
    assert 0.5 * result["seconds_per_block"] < sum(result["stages"].values()) < 1.05 * result["seconds_per_block"]
    assert result["peak_host_gb"] > 0.05
    assert [len(report["layers"]) for report in result["reports"]] == [7, 7]
    assert all(0 < report["error"] < 0.5 for report in result["reports"])


def test_what_it_cannot_time_is_refused(tool):
    with pytest.raises(BadInput, match=r"unknown shape 'gpt'.*tiny"):
        tool.bench(tool.Bench("gpt"))
    with pytest.raises(BadInput, match="multiple of 8"):
        tool.bench(tool.Bench("tiny", windows=9))
    with pytest.raises(BadInput, match="no multiple of the group size"):
        tool.bench(tool.Bench("tiny", scheme="m1v4g128"))


def test_a_curve_has_a_point_for_each_scheme(tmp_path):
    bundled, text = TOOLS.parent / "models" / "pylm-4m", tmp_path / "text.txt"
    text.write_text((bundled / "validation.txt").read_text()[:40_000])
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4096, **shape), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(bundled).save_pretrained(tmp_path / "tiny")
    path, schemes = tmp_path / "curve.json", ("m1v8g-1", "m1v4g-1")
    tool = load("quantize_curve")
    result = tool.curve(
        tool.Curve(str(tmp_path / "tiny"), str(text), str(text), path, schemes, 32, 32, 8, "cpu", (7.9,))
    )
    assert json.loads(path.read_text()) == result
    assert [row["scheme"] for row in result["rows"]] == [*schemes, "mixed"]
    for row in result["rows"]:
        assert row["gap"] == pytest.approx(math.log(row["perplexity"] / result["dense_perplexity"]))
        assert row["effort"]["samples"] == EFFORT["cpu"].samples
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
