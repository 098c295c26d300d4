"""The reproduction recipe: all its steps in miniature, and that its commands are commands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import tyro

from codegemm_eval.cli import Compare
from codegemm_quant.cli import Quantize, Tokenize, Tune

COMMANDS = {"quantize": Quantize, "tokenize": Tokenize, "tune": Tune, "compare": Compare}


@pytest.fixture(scope="module")
def smoke(root, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a smoke run, and its JSON."""
    out = tmp_path_factory.mktemp("reproduce")
    caches = {"XDG_CACHE_HOME": str(out / "cache"), "HF_HOME": str(out / "hf")}
    done = subprocess.run(
        [sys.executable, root / "tools" / "reproduce.py", "--smoke", "--device", "cpu", "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | caches,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / "smoke", json.loads(done.stdout.splitlines()[-1])


def test_every_step_of_the_smoke_run_shows_in_its_report(smoke):
    folder, result = smoke
    dense, quantized, tuned, published = result["models"]
    assert [row["name"] for row in result["models"]] == ["pylm-4m", "m1v4g128", "m1v4g128-tuned", "m1v4g128-published"]
    assert (dense["scheme"], quantized["scheme"], tuned["scheme"]) == ("dense", "m1v4g128", "m1v4g128")
    for row in (quantized, tuned, published):
        assert row["measured"]["KL validation.txt"] > 0.01
        assert row["measured"]["perplexity validation.txt"] > dense["measured"]["perplexity validation.txt"]
        assert row["measured"]["tokens/s"] > 0
        assert 0 <= row["measured"]["next_line (acc)"] <= 1
    same = "perplexity validation.txt"
    assert published["measured"][same] == quantized["measured"][same]
    assert "quantization_config" not in json.loads((folder / "m1v4g128-published" / "config.json").read_text())
    assert {file.suffix for file in folder.glob("report.*")} == {".png", ".md", ".json"}
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4 * 3


def test_lm_eval_alone_says_the_same_of_a_quantised_folder(smoke, monkeypatch, tmp_path):
    folder, _ = smoke
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "m1v4g128"), "dtype": "bfloat16"},
        tasks=["next_line"],
        task_manager=manager,
        limit=8,
        device="cpu",
        batch_size=8,
    )
    cells = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    (ours,) = (c for c in cells if c["task"] == "next_line" and c["run"]["name"] == "m1v4g128")
    theirs = found["results"]["next_line"]
    for metric in ("acc,none", "acc_norm,none"):
        assert theirs[metric] == ours["result"]["metrics"]["next_line"][metric]


@pytest.mark.parametrize("recipe", ["llama-3.1-8b", "pylm-4m", "smoke"])
def test_the_commands_of_every_recipe_are_understood(reproduce_tool, recipe, tmp_path):
    commands = reproduce_tool.run(reproduce_tool.Reproduce(recipe=recipe, out=tmp_path, processes=4, dry_run=True))[
        "commands"
    ]
    assert not list(tmp_path.iterdir())
    made = {}
    for command in map(shlex.split, commands):
        if command[0] == "torchrun":
            assert command[1:4] == ["--nproc-per-node", "4", "--no-python"]
            command = command[4:]
        script, name, *arguments = command
        assert script == ("codegemm-eval" if name == "compare" else "codegemm-quant")
        made[name] = tyro.cli(COMMANDS[name], args=arguments)
    assert list(made) == ["quantize", "tokenize", "tune", "compare"]
    assert made["tune"].student == made["quantize"].out
    assert made["tune"].data == made["tokenize"].out
    assert {made["quantize"].model, made["tune"].teacher, made["quantize"].out, made["tune"].out} <= set(
        made["compare"].folders
    ) | {made["compare"].teacher}
    if recipe == "llama-3.1-8b":
        assert made["quantize"].scheme == "m2v8g128"
        assert made["compare"].chosen.suite == ("mmlu", "csr")
        assert len(made["compare"].folders) == 5


def test_a_failed_step_is_named(reproduce_tool, tmp_path):
    with pytest.raises(RuntimeError, match=r"`codegemm-eval ppl nowhere ...` ended with status 2"):
        reproduce_tool.execute(["codegemm-eval", "ppl", "nowhere", "--data", "nothing"], tmp_path)
