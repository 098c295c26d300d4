"""The whole road in miniature: quickstart as a user runs it, then its checkpoint with only the two runtime wheels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from codegemm_eval.score import evaluate_folder
from codegemm_kernels import BadInput

ROOT = Path(__file__).resolve().parent.parent
VALIDATION = ROOT / "models" / "pylm-4m" / "validation.txt"
KEYS = {
    "model",
    "scheme",
    "device",
    "bits_per_weight",
    "ppl_dense",
    "ppl_quantized",
    "bytes_dense",
    "bytes_quantized",
    "quantize_seconds",
    "tokens_per_second",
    "sample",
    "checkpoint",
}
NOT_OF_THE_RUNTIME = ("codegemm", "_codegemm", "__editable__", "datasets", "lm_eval", "matplotlib", "pyarrow")
PROMPT = "import os\n\n\ndef "


@pytest.fixture(scope="module")
def continuation(road):
    """What the quantised model says in this process, greedily."""
    model = AutoModelForCausalLM.from_pretrained(road["checkpoint"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(road["checkpoint"])
    prompt = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()


def test_quickstart_reports_what_it_did(road):
    assert set(road) == KEYS
    assert (road["model"], road["scheme"], road["device"]) == ("models/pylm-4m", "m1v4g128", "cpu")
    assert 2.1 < road["bits_per_weight"] < 2.5  # 2.125 and the codebooks of small matrices
    assert 3 < road["ppl_dense"] < 12
    # far too little calibration for a good result, but a model of wrong weights would be above 1000
    assert road["ppl_dense"] < road["ppl_quantized"] < 3 * road["ppl_dense"]
    assert 8e6 < road["bytes_dense"] < 9e6
    assert road["bytes_quantized"] < 0.4 * road["bytes_dense"]
    assert road["quantize_seconds"] > 0
    assert road["tokens_per_second"] > 0
    assert len(road["sample"]) > len("import unittest")
    out = Path(road["checkpoint"]).parent
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "| pylm-4m | dense | 16.00 |" in (out / "quickstart.md").read_text()


def test_its_perplexity_is_that_of_the_folder(road):
    again = evaluate_folder(road["checkpoint"], str(VALIDATION), window=128, windows=8, device="cpu")
    assert again.perplexity == pytest.approx(road["ppl_quantized"], rel=1e-3)
    assert again.tokens == 8 * 127


def test_a_foreign_folder_is_never_replaced(quickstart_tool, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="choose another --out"):
        quickstart_tool.remove_previous(tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_a_text_file_is_split_into_disjoint_parts(quickstart_tool, tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "text.txt").write_text(text)
    config = quickstart_tool.Quickstart(model="m", data=str(tmp_path / "text.txt"), out=tmp_path / "out")
    model, calibration, validation = quickstart_tool.inputs(config)
    parts = Path(calibration).read_text(), Path(validation).read_text()
    assert model == "m"
    assert "".join(parts) == text
    assert len(parts[1]) == pytest.approx(len(text) / 10, rel=0.05)
    named = quickstart_tool.Quickstart(model="m", data="wikitext2")
    assert quickstart_tool.inputs(named) == ("m", "wikitext2", "wikitext2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "some/model"), "needs --data"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--scheme", "m9v4g128"), "m9v4g128"),
    ],
)
def test_bad_input_is_one_sentence(quickstart, arguments, message, tmp_path):
    done = quickstart(*arguments, "--out", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_runtime_wheels_alone_load_and_generate(road, continuation, tmp_path):
    python = venv_of_wheels(tmp_path)
    script = f"""
import importlib.util, json, torch
assert not any(importlib.util.find_spec(f"codegemm_{{name}}") for name in ("quant", "eval"))
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({road["checkpoint"]!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({road["checkpoint"]!r})
import codegemm_kernels
assert codegemm_kernels.__file__.startswith({str(tmp_path)!r}), codegemm_kernels.__file__
names = {{type(module).__name__ for module in model.model.layers.modules()}}
kinds = sorted(name for name in names if "Linear" in name)
out = model.generate(**tokenizer({PROMPT!r}, return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(json.dumps([kinds, out[0].tolist()]))
"""
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kinds, tokens = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["CodebookLinear"]
    assert tokens == continuation

    command = [python.parent / "codegemm-runtime", "generate", road["checkpoint"], "--prompt", PROMPT]
    options = ["--max-new-tokens", "8", "--device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def venv_of_wheels(folder: Path) -> Path:
    """A virtual environment with the two wheels, freshly built for the CPU, beside the third-party packages of this
    one; nothing of quant and eval is in it. Returns its python."""
    uv = shutil.which("uv")
    assert uv is not None, "the tests are run by uv"
    environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {"CODEGEMM_CUDA": "OFF"}

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [uv, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr

    for package in ("codegemm-kernels", "codegemm-runtime"):
        run("build", "--package", package, "--wheel", "--out-dir", folder / "dist")
    for wheel in (folder / "dist").glob("*.whl"):
        inside = {
            name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/licenses/" in name
        }
        assert inside == {"LICENSE", "NOTICE"}, wheel.name
    run("venv", "--python", sys.executable, folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run("pip", "install", "--python", python, "--no-deps", *sorted((folder / "dist").glob("*.whl")))
    site = next((folder / "venv" / "lib").glob("python3*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = entry.name.startswith(NOT_OF_THE_RUNTIME) or entry.suffix == ".pth"
        if not ours and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python
