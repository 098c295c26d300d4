from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from codegemm_eval import results as module
from codegemm_eval.results import Cell, ResultFile, describe_run, model_content
from codegemm_kernels import BadInput


def cell(value: float, model: str = "m", task: str = "t", **setting) -> Cell:
    return Cell(model, task, setting, {"value": value}, {"date": "today"})


def test_results_append_and_are_found_by_model_task_and_setting(tmp_path):
    file = ResultFile(tmp_path / "new" / "results.jsonl")
    file.add(cell(1, window=8))
    file.add(cell(2, window=16))
    file.add(cell(3, model="n", window=8))
    file.add(cell(4, task="u", window=8))
    file.add(cell(5, window=8))  # measured again
    again = ResultFile(file.path)
    for each in (file, again):
        assert each.find("m", "t", {"window": 8}) == cell(5, window=8)
        assert each.find("m", "t", {"window": 16}) == cell(2, window=16)
        assert each.find("n", "t", {"window": 8}) == cell(3, model="n", window=8)
        assert each.find("m", "t", {}) is None
    assert len(file.path.read_text().splitlines()) == 5


@pytest.mark.parametrize("content", ["[]", "{", '{"dense": 1}', '"text"'])
def test_a_foreign_results_file_is_left_alone(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"results\.jsonl line 1"):
        ResultFile(path)
    assert path.read_text() == content


def test_a_model_is_known_by_its_content(folder, tmp_path):
    content = model_content(folder)
    copy = tmp_path / "another name"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("not of the model")
    assert model_content(copy) == content
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert model_content(copy) != content
    shutil.copy(folder / "model.safetensors", weights)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"bos_token": "</s>"}))
    assert model_content(copy) != content


def test_a_run_says_where_and_when():
    run = describe_run("a model", torch.device("cpu"))
    assert run["name"] == "a model"
    assert run["date"].startswith("20")
    assert torch.__version__.startswith(run["versions"]["torch"].partition("+")[0])
    assert all(run["versions"][name] for name in ("codegemm-eval", "transformers", "lm-eval"))
    assert "threads" in run["hardware"]


def test_the_commit_is_that_of_the_sources_and_no_other(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "results.py"
    source.write_text("x")
    monkeypatch.setattr(module, "__file__", str(source))
    assert module.commit() is None
    git("init", "-q")
    (tmp_path / "other").write_text("x")
    git("add", "other")
    git("commit", "-qm", "other")
    assert module.commit() is None  # a virtual environment inside somebody's repository
    git("add", "results.py")
    git("commit", "-qm", "sources")
    assert module.commit() == git("rev-parse", "HEAD")
    source.write_text("y")
    assert module.commit() == git("rev-parse", "HEAD") + "-dirty"
    assert Path(module.__file__) == source
