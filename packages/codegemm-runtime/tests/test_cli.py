"""The console script as a user meets it: stdout, stderr and exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="only the command line needs tyro")

from codegemm_runtime.cli import main

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}|{% endfor %}"
SCRIPT = ("-c", "import sys; from codegemm_runtime.cli import main; sys.exit(main())")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Path:
    checkpoint = make_checkpoint()
    write_tokenizer(checkpoint.folder)
    path: Path = checkpoint.folder
    return path


def last_json(stdout: str) -> dict[str, Any]:
    value = json.loads(stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def assert_one_sentence(status: int, stdout: str, stderr: str, *parts: str) -> None:
    assert status == 2, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]


def test_generate_in_a_process_of_its_own(run_python: Run, folder: Path) -> None:
    options = ("--prompt", "hello there", "--max-new-tokens", "9", "--device", "cpu")
    result = run_python(*SCRIPT, "generate", str(folder), *options)
    assert result.returncode == 0, result.stderr
    summary = last_json(result.stdout)
    assert list(summary) == ["text", "tokens", "seconds", "tokens_per_second", "time_to_first_token"]
    assert 1 <= summary["tokens"] <= 9
    assert result.stdout.startswith(summary["text"])


def test_bad_input_in_a_process_of_its_own(run_python: Run) -> None:
    result = run_python(*SCRIPT, "generate", "./nowhere", "--prompt", "x")
    assert_one_sentence(result.returncode, result.stdout, result.stderr, "./nowhere")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("generate", "{folder}", "--prompt", ""), ("prompt is empty",)),
        (("generate", "{folder}", "--prompt", "x" * 100), ("100 tokens", "holds 64")),
        (("generate", "{folder}", "--prompt", "x", "--device", "gpu"), ("gpu",)),
        (("generate", "{folder}", "--prompt", "x", "--temperature", "-1"), ("temperature",)),
        (("chat", "{folder}"), ("no chat template",)),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    status = main([argument.format(folder=folder) for argument in arguments])
    assert_one_sentence(status, *capsys.readouterr(), *parts)


def test_truncated_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    arguments = ["generate", str(folder), "--prompt", "x"]
    assert_one_sentence(main(arguments), *capsys.readouterr(), "model.safetensors", "cut short")
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    stdout, stderr = capsys.readouterr()
    summary = last_json(stdout)
    assert (summary["scheme"], summary["layers"], summary["problems"]) == ("m2v8g32", 14, [])
    assert "model.layers.1.mlp.down_proj" in stderr
    assert "cpu" in summary["kernels"]
    (folder / "model.safetensors").write_bytes(b"short")
    assert main(["inspect", str(folder)]) == 2
    stdout, stderr = capsys.readouterr()
    assert "model.safetensors" in last_json(stdout)["problems"][0]
    assert "Traceback" not in stderr


def test_help_is_made_of_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["generate", "--help"], 0), (["generate"], 2), (["nothing"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    assert "Largest number of new tokens" in capsys.readouterr().out


def test_chat(
    folder: Path,
    write_tokenizer: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tokenizer(folder, TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" + "y" * 80 + "\nhow?\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "6", "--device", "cpu", "--system", "S"]) == 0
    stdout, stderr = capsys.readouterr()
    assert last_json(stdout)["turns"] == 2
    assert "holds 64" in stderr


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]
) -> None:
    checkpoint = make_checkpoint(name="long")
    checkpoint.edit_config(max_position_embeddings=100_000)
    config = json.loads((checkpoint.folder / "generation_config.json").read_text())
    (checkpoint.folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    write_tokenizer(checkpoint.folder, TEMPLATE)
    arguments = ("chat", str(checkpoint.folder), "--max-new-tokens", "50000", "--device", "cpu")
    process = subprocess.Popen(
        [sys.executable, *SCRIPT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # streaming has begun
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, stderr.decode()
    assert b"[stopped]" in stdout
    summary = last_json(stdout.decode(errors="replace"))
    assert summary["turns"] == 1
    assert 0 < summary["tokens"] < 50_000
