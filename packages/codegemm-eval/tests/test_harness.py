from __future__ import annotations

import json

import datasets
import pytest

from codegemm_eval.harness import run_tasks, store_results
from codegemm_eval.perplexity import perplexity
from codegemm_eval.text import read_tokens
from codegemm_kernels import BadInput

LINE = "The quick brown fox jumps over the lazy dog"


def test_an_in_memory_task_gives_the_perplexity_that_ours_gives(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    task = {
        "task": "one_line",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict({"text": [LINE]})},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
        "metadata": {"version": 1.0},
    }
    results = run_tasks(model, tokenizer, [task])
    bits = results["one_line"]["bits_per_byte,none"]
    # lm-eval predicts the first byte too, after a prefix of the BOS token; ours needs it in the text
    (tmp_path / "a.txt").write_text(f"<s>{LINE}")
    tokens = read_tokens(str(tmp_path / "a.txt"), tokenizer)
    ours = perplexity(model, tokens, window=len(LINE) + 1)
    assert ours.tokens == len(LINE)
    assert bits == pytest.approx(ours.nll / 0.6931471805599453, rel=1e-4)


def test_unknown_tasks_are_refused(model, tokenizer):
    with pytest.raises(BadInput, match="no task not_a_task"):
        run_tasks(model, tokenizer, ["not_a_task"])


def test_results_are_kept_for_each_model(tmp_path):
    path = tmp_path / "out" / "results.json"
    store_results(path, "dense", {"arc": {"acc": 0.5}})
    store_results(path, "quantized", {"arc": {"acc": 0.4}})
    store_results(path, "dense", {"piqa": {"acc": 0.6}})
    assert json.loads(path.read_text()) == {
        "dense": {"arc": {"acc": 0.5}, "piqa": {"acc": 0.6}},
        "quantized": {"arc": {"acc": 0.4}},
    }
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["[]", "{", '{"dense": 1}'])
def test_a_foreign_results_file_is_left_alone(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"results\.json"):
        store_results(path, "dense", {})
    assert path.read_text() == content
