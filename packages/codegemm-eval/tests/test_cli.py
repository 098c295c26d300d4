from __future__ import annotations

import json
import sys

import pytest

from codegemm_eval.cli import main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 10)
    return str(path)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `codegemm-eval` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["codegemm-eval", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_ppl_prints_one_json_line(monkeypatch, capsys, folder, text):
    options = ("--data", text, "--window", "32", "--windows", "4", "--device", "cpu")
    status, out, _ = run(monkeypatch, capsys, "ppl", str(folder), *options)
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert set(result) == {"perplexity", "nll", "tokens", "seconds"}
    assert result["tokens"] == 4 * 31
    assert 200 < result["perplexity"] < 350  # an untrained model knows little more than its 258 tokens


def test_compare_writes_table_and_chart(monkeypatch, capsys, folder, text, tmp_path):
    chart = tmp_path / "chart.png"
    options = ("--data", text, "--window", "32", "--chart", str(chart), "--device", "cpu")
    status, out, err = run(monkeypatch, capsys, "compare", str(folder), str(folder), *options)
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert [row["scheme"] for row in result["models"]] == ["dense", "dense"]
    assert result["models"][0]["bits_per_weight"] == 32
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "| tiny | dense | 32.00 |" in chart.with_suffix(".md").read_text()
    assert "perplexity" in err


def test_a_chart_of_an_unknown_kind_is_refused_at_once(monkeypatch, capsys, folder, text, tmp_path):
    options = ("--data", text, "--window", "32", "--chart", str(tmp_path / "chart.xyz"), "--device", "cpu")
    status, _, err = run(monkeypatch, capsys, "compare", str(folder), *options)
    assert status == 2
    assert "must end in one of .png, .svg, .pdf" in err
    assert "evaluating" not in err


def test_bad_input_is_one_sentence_and_status_2(monkeypatch, capsys, folder, text, tmp_path):
    for arguments, message in (
        (("ppl", str(tmp_path / "nowhere"), "--data", text), "nowhere"),
        (("ppl", str(folder), "--data", str(tmp_path / "none.txt")), "none.txt"),
        (("ppl", str(folder), "--data", text, "--window", "256", "--windows", "0"), "0 windows"),
        (("compare", "--data", text), "one or more checkpoint folders"),
    ):
        status, out, err = run(monkeypatch, capsys, *arguments)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err
        assert "Traceback" not in err
