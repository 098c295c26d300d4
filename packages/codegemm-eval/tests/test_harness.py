from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import lm_eval.tasks
import pytest
import torch

from codegemm_eval import harness as module
from codegemm_eval.harness import Harness, TaskOptions
from codegemm_eval.perplexity import perplexity
from codegemm_eval.text import load_text
from codegemm_eval.tokens import tokenize
from codegemm_eval.windows import Protocol
from codegemm_kernels import BadInput

LINES = ("The quick brown fox jumps over the lazy dog", "Sphinx of black quartz, judge my vow")
ROLLING = """\
task: two_lines
dataset_path: json
dataset_kwargs: {data_files: {test: two_lines.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
metadata: {version: 1.0}
"""


@pytest.fixture
def task_file(tmp_path, monkeypatch) -> Path:
    """A task of one's own, its data beside it, seen from another folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "two_lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    (folder / "two_lines.yaml").write_text(ROLLING)
    return folder / "two_lines.yaml"


def test_a_local_task_gives_the_perplexity_that_ours_gives(model, tokenizer, task_file):
    harness = Harness(TaskOptions(tasks=(str(task_file),)))
    (task,) = harness.tasks
    result = harness.run(task, model, tokenizer)
    # lm-eval predicts the first byte too, after a prefix of the BOS token
    nll = 0.0
    for number, line in enumerate(LINES):
        (task_file.parent / f"{number}.txt").write_text(line)
        protocol = Protocol(window=len(line) + 1, bos="text")
        text = tokenize(load_text(str(task_file.parent / f"{number}.txt")), tokenizer, protocol)
        ours = perplexity(model, text.cut(protocol))
        assert ours.tokens == len(line)
        nll += ours.nll * ours.tokens
    assert (task.name, result["metric"]) == ("two_lines", "bits_per_byte")
    assert result["value"] == pytest.approx(nll / sum(map(len, LINES)) / 0.6931471805599453, rel=1e-4)
    assert result["metrics"]["two_lines"]["bits_per_byte,none"] == result["value"]
    json.dumps(result)


def test_lm_eval_itself_says_the_same(folder, model, tokenizer, task_file, monkeypatch):
    harness = Harness(TaskOptions(tasks=(str(task_file),), limit=1))
    ours = harness.run(harness.tasks[0], model, tokenizer)
    monkeypatch.chdir(task_file.parent)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["two_lines"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(task_file.parent), include_defaults=False),
        limit=1,
        device="cpu",
    )
    assert theirs["results"]["two_lines"]["bits_per_byte,none"] == pytest.approx(ours["value"], rel=1e-6)


def test_options_reach_lm_eval(model, tokenizer, task_file, monkeypatch):
    seen = {}

    def evaluate(**arguments):
        seen.update(arguments)
        return {"results": {"two_lines": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "two_lines"}}}

    options = ("bootstrap_iters=7", "max_length=99", "system_instruction=be brief")
    harness = Harness(TaskOptions(tasks=(str(task_file),), num_fewshot=2, limit=3.0, options=options))
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval, "simple_evaluate", evaluate)
        result = harness.run(harness.tasks[0], model, tokenizer, batch_size=5)
    assert (seen["num_fewshot"], seen["limit"], seen["bootstrap_iters"]) == (2, 3, 7)
    assert seen["system_instruction"] == "be brief"
    assert (seen["model"].max_length, seen["model"].batch_size) == (99, 5)
    assert (result["metric"], result["value"]) == ("acc", 0.5)
    settings = harness.settings(harness.tasks[0])
    assert settings["max_length"] == 99
    (task_file.parent / "two_lines.jsonl").write_text('{"text": "other"}\n')
    changed = Harness(TaskOptions(tasks=(str(task_file),), num_fewshot=2, limit=3.0, options=options))
    assert changed.settings(changed.tasks[0]) != settings  # the data belong to the setting


def test_a_task_that_does_not_fit_starts_again_with_half_the_batch(model, tokenizer, task_file, monkeypatch, capsys):
    batches = []

    def evaluate(**arguments):
        batches.append(arguments["model"].batch_size)
        if batches[-1] > largest:
            raise torch.OutOfMemoryError("too many requests")
        return {"results": {"two_lines": {"acc,none": 0.5}}}

    harness = Harness(TaskOptions(tasks=(str(task_file),)))
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    largest = 2
    assert harness.run(harness.tasks[0], model, tokenizer)["value"] == 0.5
    assert batches == [module.CPU_BATCH, 4, 2]
    assert "again with 2 requests" in capsys.readouterr().err
    largest = 0
    with pytest.raises(BadInput, match="one request of two_lines does not fit"):
        harness.run(harness.tasks[0], model, tokenizer, batch_size=1)


def test_suites_are_the_published_ones(monkeypatch):
    index = lm_eval.tasks.TaskManager()  # takes seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: index)
    harness = Harness(TaskOptions(suite=("csr", "mmlu")))
    tasks = [(task.name, task.num_fewshot) for task in harness.tasks]
    csr = ("winogrande", "piqa", "arc_easy", "arc_challenge", "hellaswag")
    assert tasks == [*((name, 0) for name in csr), ("mmlu", 5)]
    with pytest.raises(BadInput, match="no task not_a_task"):
        Harness(TaskOptions(tasks=("arc_easy", "not_a_task")))


def test_data_that_cannot_be_had_is_one_sentence(model, tokenizer, task_file):
    (task_file.parent / "two_lines.jsonl").unlink()
    harness = Harness(TaskOptions(tasks=(str(task_file),)))
    with pytest.raises(OSError, match=r"the data of the task two_lines cannot .*two_lines\.jsonl"):
        harness.run(harness.tasks[0], model, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": ("no_such=1",)}, "no_such=1.*max_length"),
        ({"options": ("batch_size=1",)}, "batch_size=1"),
        ({"options": ("max_length",)}, "give KEY=VALUE"),
        ({"limit": 0.0}, "limit of 0"),
        ({"tasks": ("nowhere.yaml",)}, "no task file nowhere.yaml"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(BadInput, match=message):
        Harness(TaskOptions(**options))


@pytest.mark.parametrize(("content", "message"), [("a: [", "cannot be read"), ("dataset_path: json\n", "task: NAME")])
def test_bad_task_files(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(BadInput, match=message):
        Harness(TaskOptions(tasks=(str(tmp_path / "bad.yaml"),)))
