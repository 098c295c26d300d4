"""The whole road in miniature: quickstart as a user runs it. tests/test_wheels.py goes on with its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegemm_eval.score import evaluate_folder
from codegemm_kernels import BadInput
from codegemm_runtime import inspect_folder

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


def test_its_files_are_those_of_its_checksums(road):
    found = inspect_folder(road["checkpoint"], verify=True)
    assert (found.problems, found.verified, found.checksums) == ([], True, True)


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
