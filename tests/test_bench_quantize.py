"""tools/bench_quantize.py on a shape that takes a second."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from codegemm_kernels import BadInput

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_quantize.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_quantize", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_quantize"] = module
    spec.loader.exec_module(module)
    return module


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
