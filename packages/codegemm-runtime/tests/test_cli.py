"""The console script as a user meets it: stdout, stderr and exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="only the command line needs tyro")

from codegemm_kernels import NumericalError
from codegemm_runtime import load_tokenizer
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
    options = ("--prompt", "hello there", "--max-new-tokens", "9", "--device", "cpu", "--head-bits", "8")
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
        (("generate", "{folder}", "--prompt", "x", "--head-bits", "3"), ("8 or 4 bits, not to 3",)),
        (("generate", "{folder}", "--prompt", "x", "--temperature", "-1"), ("temperature",)),
        (("generate", "{folder}"), ("--prompt TEXT or --prompts FILE",)),
        (("generate", "{folder}", "--prompt", "x", "--out", "x.jsonl"), ("--out needs --prompts",)),
        (("generate", "{folder}", "--prompts", "nowhere.txt"), ("nowhere.txt",)),
        (("generate", "{folder}", "--prompts", "{folder}/empty.txt"), ("empty.txt holds no prompts",)),
        (("generate", "{folder}", "--prompts", "{folder}/bad.jsonl"), ("line 3 of", "not valid JSON")),
        (("generate", "{folder}", "--prompts", "{folder}/odd.jsonl"), ("line 1 of", "called prompt")),
        (("generate", "{folder}", "--prompts", "{folder}/bad.jsonl", "--batch", "0"), ("line 3",)),
        (("generate", "{folder}", "--prompts", "{folder}/half.jsonl"), ("line 2 of", "not UTF-8 at character 2")),
        (("generate", "{folder}", "--prompt", "ab\udcff"), ("not UTF-8 at character 3",)),
        (("generate", "{folder}", "--prompt", "x", "--temperature", "nan"), ("temperature",)),
        (("generate", "{folder}", "--prompt", "x", "--repetition-penalty", "inf"), ("repetition penalty",)),
        (("generate", "{folder}", "--prompt", "x", "--seed", "9" * 30), ("seed",)),
        (("generate", "{folder}", "--prompts", "{folder}/fine.txt", "--out", "{folder}"), ("cannot be written",)),
        (("generate", "{folder}", "--prompts", "{folder}/fine.txt", "--out", "{folder}/no/x"), ("cannot be written",)),
        (("generate", "{folder}", "--prompts", "{folder}/fine.txt", "--out", "{folder}/fine.txt"), ("line 1 of",)),
        (("chat", "{folder}"), ("no chat template", "--plain")),
        (("convert", "{folder}", "{folder}"), ("exists",)),
        (("convert", "{folder}", "{folder}/out"), ("is codegemm already",)),
        (("convert", "{folder}", "{folder}/out", "--base", "{folder}"), ("only those need --base",)),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    (folder / "empty.txt").write_text("\n \n")
    (folder / "bad.jsonl").write_text('"one"\n\n{"prompt": ')
    (folder / "fine.txt").write_text("one\ntwo")
    (folder / "half.jsonl").write_text('"one"\n"a\\ud800"')
    (folder / "odd.jsonl").write_text('{"text": "one"}')
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


def test_chat_survives_a_failed_request(
    folder: Path,
    write_tokenizer: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without template only with --plain; an answer of NaN costs that answer and not the program."""
    from codegemm_runtime import chat, generation

    write_tokenizer(folder)
    asked = []

    def fail_once(*arguments: Any, **options: Any) -> generation.Generation:
        asked.append(arguments[2].tolist()[0])
        if len(asked) == 1:
            raise NumericalError("the model's logits are NaN")
        return generation.Generation("fine", 1, 1.0, 0.5)

    monkeypatch.setattr(chat, "generate_text", fail_once)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhow?\nwhy?\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "6", "--device", "cpu", "--plain"]) == 0
    stdout, stderr = capsys.readouterr()
    assert last_json(stdout)["turns"] == 2
    assert "error: the model's logits are NaN" in stderr
    decode = load_tokenizer(folder).decode
    assert [decode(ids) for ids in asked] == ["hi", "how?", "how?\nfine\nwhy?"]


def test_commands_start_without_loading_bars(run_python: Run, folder: Path) -> None:
    result = run_python(*SCRIPT, "generate", str(folder), "--prompt", "-", "--max-new-tokens", "2", stdin="some text")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


PROMPTS = {
    "lines.txt": "one\r\n\ntwo\nthree\n" + "x" * 100 + "\nfive",
    "objects.jsonl": '"one"\n{"prompt": "two", "id": 7}\n\n"three"\n' + json.dumps("x" * 100) + '\n"five"',
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_many_prompts(
    make_checkpoint: Callable[..., Any],
    write_tokenizer: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    architecture: str,
) -> None:
    """By the engine and by transformers: each prompt's text is what it gets alone, and a bad one stops nobody."""
    folder = make_checkpoint(architecture).folder
    write_tokenizer(folder)
    (tmp_path / name).write_text(PROMPTS[name], newline="")
    options = ["--max-new-tokens", "7", "--device", "cpu"]
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / name), "--batch", "3", *options]
    assert main([*arguments, "--out", str(tmp_path / "out.jsonl")]) == 2  # one of them failed
    stdout, stderr = capsys.readouterr()
    summary = last_json(stdout)
    assert (summary["prompts"], summary["failed"], summary["out"]) == (5, 1, str(tmp_path / "out.jsonl"))
    assert "5/5" in stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two", "three", "x" * 100, "five"]
    assert "holds 64" in answers.pop(3)["error"]
    assert summary["tokens"] == sum(answer["tokens"] for answer in answers)
    for answer in answers:
        assert main(["generate", str(folder), "--prompt", answer["prompt"], *options]) == 0
        alone = last_json(capsys.readouterr().out)
        assert (answer["text"], answer["tokens"]) == (alone["text"], alone["tokens"])


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_stop_strings(
    make_checkpoint: Callable[..., Any],
    write_tokenizer: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
) -> None:
    folder = make_checkpoint(architecture).folder
    write_tokenizer(folder)
    options = ["--max-new-tokens", "20", "--device", "cpu"]
    assert main(["generate", str(folder), "--prompt", "one", *options]) == 0
    text = last_json(capsys.readouterr().out)["text"]
    stop = text[4:6]
    expected = text[: text.index(stop)]
    assert main(["generate", str(folder), "--prompt", "one", *options, "--stop", "never", stop]) == 0
    alone = last_json(capsys.readouterr().out)
    (tmp_path / "in.txt").write_text("one\nzwei")
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "in.txt"), *options, "--stop", stop]) == 0
    among_others = json.loads(capsys.readouterr().out.splitlines()[0])
    assert alone["text"] == among_others["text"] == expected
    # transformers may have made one token more when it asks whether to stop
    assert among_others["tokens"] <= alone["tokens"] < 20


def test_an_interrupted_run_of_many_prompts_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from codegemm_runtime import prompts

    (tmp_path / "in.txt").write_text("one\ntwo\nthree\nfour\nfive")
    out = tmp_path / "out.jsonl"
    options = ["--batch", "2", "--max-new-tokens", "3", "--device", "cpu", "--out", str(out)]
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "in.txt"), *options]
    assert main(arguments) == 0
    whole = out.read_text()
    out.unlink()
    original, calls = prompts._continue, []

    def interrupt(*given: Any) -> list[int]:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "_continue", interrupt)
        assert main(arguments) == 130
    assert out.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    capsys.readouterr()
    assert main(arguments) == 0
    assert last_json(capsys.readouterr().out)["prompts"] == 3
    assert out.read_text() == whole
    (tmp_path / "in.txt").write_text("other\ntwo")
    assert main(arguments) == 2
    assert "line 1 of" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 40])
def test_answers_cut_short_are_made_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    """A killed run may leave half a line, and a prompt may hold what other tools take for the end of one."""
    (tmp_path / "in.txt").write_text("a\u2028b\nzwölf\none\none")
    out = tmp_path / "out.jsonl"
    options = ["--batch", "2", "--max-new-tokens", "3", "--device", "cpu", "--out", str(out), "--temperature", "2"]
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "in.txt"), *options]
    assert main(arguments) == 0
    whole = out.read_bytes()
    two = b"".join(whole.splitlines(keepends=True)[:2])
    third = whole[len(two) :].splitlines(keepends=True)[0]
    out.write_bytes(two + third[:cut])
    capsys.readouterr()
    assert main(arguments) == 0
    assert last_json(capsys.readouterr().out)["prompts"] == 2
    assert out.read_bytes() == whole
    foreign = two + b"other"
    out.write_bytes(foreign)
    assert main(arguments) == 2
    assert out.read_bytes() == foreign


def test_answers_into_a_device(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("one")
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "in.txt"), "--max-new-tokens", "2"]
    assert main([*arguments, "--device", "cpu", "--out", os.devnull]) == 0
    assert last_json(capsys.readouterr().out)["prompts"] == 1


def test_convert(make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("qwen2", published=True).folder
    (tmp_path / "file").touch()
    assert main(["convert", str(source), str(tmp_path / "file" / "ours")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "ours"), "--dtype", "bfloat16"]) == 0
    stdout, stderr = capsys.readouterr()
    expected = {"from": "published", "to": "codegemm", "scheme": "m2v8g32", "layers": 14, "dense_layers": []}
    assert expected.items() <= last_json(stdout).items()
    assert "convert: 100%" in stderr
    assert main(["inspect", str(tmp_path / "ours"), "--verify"]) == 0
    assert last_json(capsys.readouterr().out)["dtype"] == "bfloat16"


def test_many_prompts_through_pipes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["generate", str(folder), "--prompts", "-", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("prompt") for line in lines] == ["one", "two", None]
    assert lines[-1]["failed"] == 0
