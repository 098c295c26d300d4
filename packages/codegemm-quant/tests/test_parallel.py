"""Two processes on CPUs, talking gloo, against one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from codegemm_kernels import BadInput
from codegemm_quant import QuantizeConfig, quantize
from codegemm_quant.parallel import ALONE, Team
from codegemm_quant.subject import batch_size

RUN = "import json, sys; from codegemm_quant import *; print(quantize(QuantizeConfig(**json.loads(sys.argv[1]))))"


def run(options, processes):
    """Start what torchrun would start, without its second of set-up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", RUN, json.dumps(options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=os.environ | environment, **pipes))
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1][-2000:]
    return outputs


def test_two_processes_make_what_one_makes(tiny_model, text_file, tmp_path):
    folder = tiny_model()  # in fp32, so that sums in another order differ by very little
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    options = {
        "model": str(folder), "data": str(text_file), "scheme": "m1v4g32", "samples": 16, "sequence_length": 32,
        "device": "cpu", "rounds": 2, "tune_epochs": 1, "model_epochs": 1,
    }  # fmt: skip
    quantize(QuantizeConfig(**options | {"out": str(tmp_path / "one")}))
    outputs = run(options | {"out": str(tmp_path / "two")}, 2)
    assert "quantise:" in outputs[0][1]
    assert "quantise:" not in outputs[1][1]
    reports = [json.loads((tmp_path / name / "quantization_report.json").read_text()) for name in ("one", "two")]
    for number, (one, two) in enumerate(zip(*(report["per_block"] for report in reports), strict=True)):
        assert two["error"] == pytest.approx(one["error"], rel=0.3)
        for name, layer in one["layers"].items():
            # Rounding decides between codes that are as good as each other, and later layers see the difference.
            bound = 1e-3 if (number, name) == (0, "self_attn.q_proj") else 0.3
            assert two["layers"][name]["relative_error"] == pytest.approx(layer["relative_error"], rel=bound)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    name = "model.layers.0.self_attn.q_proj"  # the first: nothing before it has been rounded another way
    same = (one[f"{name}.codes"].view(torch.uint8) == two[f"{name}.codes"].view(torch.uint8)).float().mean()
    assert same > 0.95
    assert not Path(f"{tmp_path}/two.work").exists()


def test_shares_of_a_team():
    tensor = torch.arange(10).view(5, 2)
    parts = [Team(rank, 3).own(tensor) for rank in range(3)]
    assert torch.equal(torch.cat(parts), tensor)
    assert ALONE.join(tensor, 5) is tensor
    assert [batch_size(256, Team(0, size)) for size in (1, 2, 4, 16)] == [8, 8, 8, 16]
    assert batch_size(36, Team(0, 3)) == 6
    with pytest.raises(BadInput, match="256 samples cannot be shared among 3"):
        batch_size(256, Team(0, 3))
