from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from codegemm_eval import harness
from codegemm_eval.cli import main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 10)
    return str(path)


@pytest.fixture
def other(folder, tmp_path):
    """A second model with the same tokenizer."""
    path = tmp_path / "other"
    shutil.copytree(folder, path)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder).config).save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Exit status, JSON and stderr of `codegemm-eval` with these arguments."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, dict, str]:
        monkeypatch.setattr(sys, "argv", ["codegemm-eval", *arguments, "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return int(end.value.code or 0), json.loads(lines[-1]) if lines else {}, captured.err

    return call


def test_ppl_says_what_was_measured(run, folder, other, text):
    options = ("--data", text, "--window", "32", "--windows", "4", "--spread", "--stride", "16")
    status, result, err = run("ppl", str(folder), *options, "--teacher", str(other))
    assert status == 0
    assert result["tokens"] == 31 + 3 * 16
    assert 200 < result["perplexity"] < 350  # an untrained model knows little more than its 258 tokens
    assert 0 < result["divergence"] < 1
    assert 0 <= result["top1_agreement"] < 1
    assert (result["data"], result["window"], result["stride"], result["windows"]) == ("text.txt", 32, 16, 4)
    assert result["windows_in_text"] == (270 - 32) // 16 + 1
    assert (result["windows_chosen"], result["bos"]) == ("evenly spaced", "none")
    assert "4 of 15 windows (evenly spaced) of 32 tokens, stride 16; BOS: none" in err
    assert run("ppl", str(folder), "--data", text, "--window", "32", "--windows", "4")[1]["windows_chosen"] == "first"
    assert run("ppl", str(folder), "--data", text, "--window", "128")[1]["windows_chosen"] == "all"


def test_compare_writes_everything_and_measures_nothing_twice(run, folder, other, text, tmp_path, monkeypatch):
    chart = tmp_path / "out" / "chart.png"
    options = ("--data", text, "--window", "32", "--chart", str(chart), "--teacher", str(folder), "--speed")
    speed = ("--prompt-tokens", "4", "--new-tokens", "3", "--runs", "1")
    status, result, err = run("compare", str(folder), str(other), *options, *speed)
    assert status == 0, err
    first, second = result["models"]
    assert (first["scheme"], first["bits_per_weight"], second["name"]) == ("dense", 32, "other")
    assert list(first["measured"]) == ["perplexity text.txt", "tokens/s"]  # it is the teacher
    assert second["measured"]["KL text.txt"] > 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "| tiny | dense | 32.00 |" in chart.with_suffix(".md").read_text()
    report = json.loads(chart.with_suffix(".json").read_text())
    assert report["models"] == result["models"]
    assert [cell["task"] for cell in report["cells"]] == ["perplexity", "speed"] * 2
    assert all(cell["run"]["versions"]["torch"] for cell in report["cells"])
    assert "perplexity text.txt" in err

    monkeypatch.setattr("codegemm_runtime.loading.load_model", lambda *_, **__: pytest.fail("measured again"))
    moved = folder.rename(tmp_path / "moved")  # known by its content
    again = run("compare", str(moved), str(other), *options[:-3], "--teacher", str(moved), "--speed", *speed)
    assert again[0] == 0
    assert again[1]["models"][1] == second
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    monkeypatch.undo()


def test_redo_measures_again(run, folder, text, tmp_path):
    for redo in ((), (), ("--redo",)):
        assert run("compare", str(folder), "--data", text, "--window", "32", *redo)[0] == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_finished_cells_survive_a_failure(run, folder, other, text, tmp_path):
    (other / "tokenizer.json").unlink()
    status, _, err = run("compare", str(folder), str(other), "--data", text, "--window", "32")
    assert status == 2
    assert "what was finished is kept in results.jsonl" in err
    assert "has no tokenizer" in err.splitlines()[-1]
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["run"]["name"] == folder.name


def test_ctrl_c_says_where_finished_cells_are(run, folder, other, text, tmp_path, monkeypatch):
    arguments = "compare", "--data", text, "--window", "32"
    assert run(*arguments, str(folder))[0] == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("codegemm_runtime.loading.load_model", interrupted)
    status, _, err = run(*arguments, str(folder), str(other))
    assert status == 130
    assert err.splitlines()[-2:] == ["what was finished is kept in results.jsonl", "interrupted"]


def test_tasks_are_kept(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "task.yaml").write_text(
        "task: choice\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [' a', ' b']\ndoc_to_target: '{{a}}'\n"
    )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"q": f"q{i}", "a": i % 2}) + "\n" for i in range(4)))
    status, result, err = run("tasks", str(folder), "--tasks", "task.yaml", "--limit", "3")
    assert status == 0, err
    assert result["tasks"]["choice"]["metric"] == "acc"
    assert result["tasks"]["choice"]["value"] in (0, 1 / 3, 2 / 3, 1)
    assert result["tasks"]["choice"]["metrics"]["choice"]["sample_len"] == 3
    monkeypatch.setattr(harness.Harness, "run", lambda *_, **__: pytest.fail("run again"))
    assert run("tasks", str(folder), "--tasks", "task.yaml", "--limit", "3")[1] == result


def test_bad_input_is_one_sentence_and_status_2(run, folder, text, tmp_path):
    (tmp_path / "sub").mkdir()
    twin = shutil.copy(text, tmp_path / "sub")
    for arguments, message in (
        (("ppl", str(tmp_path / "nowhere"), "--data", text), "nowhere"),
        (("ppl", str(folder), "--data", str(tmp_path / "none.txt")), "none.txt"),
        (("ppl", str(folder), "--data", text, "--window", "256", "--windows", "0"), "0 windows"),
        (("ppl", str(folder), "--data", text, "--window", "1"), "window of 1"),
        (("ppl", str(folder), "--data", text, "--window", "1024"), "270 tokens and one window needs 1024"),
        (("ppl", str(folder), "--data", text, "--batch-size", "0"), "batch of 0"),
        (("compare", "--data", text), "one or more checkpoint folders"),
        (("compare", str(folder)), "nothing to measure"),
        (("compare", str(folder), "--data", text, twin), "the same name"),
        (("compare", str(folder), "--data", text, "--chart", "chart.xyz"), "must end in one of .png, .svg, .pdf"),
        (("tasks", str(folder)), "give --tasks or --suite"),
        (("tasks", str(folder), "--tasks", "none.yaml"), "none.yaml"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, {}), arguments
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err
        assert "Traceback" not in err
