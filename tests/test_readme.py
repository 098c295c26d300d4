"""What the README says to type: two commands are those of CI, the others run here on one block of the bundled model.

They run as they stand, with little effort added where the real one takes minutes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LITTLE = {
    "quantize": "--samples 4 --sequence-length 64 --rounds 0 --tune-epochs 0 --model-epochs 0",
    "tune": "--steps 2 --batch-size 2 --sequence-length 64 --eval-windows 2",
    "generate": "--max-new-tokens 4",
}


@pytest.fixture(scope="module")
def blocks(read_docs: Any, root: Path) -> list[Any]:
    return list(read_docs.blocks(root / "README.md"))


@pytest.fixture
def reader(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the commands name, the current one. One thread, as small products wait for more."""
    bundled, threads = root / "models" / "pylm-4m", torch.get_num_threads()
    model = AutoModelForCausalLM.from_pretrained(bundled, num_hidden_layers=1)
    for keeper in (model, AutoTokenizer.from_pretrained(bundled)):
        keeper.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "calibration.txt").write_text((bundled / "calibration.txt").read_text()[:40_000])
    (tmp_path / "validation.txt").write_text((bundled / "validation.txt").read_text()[:20_000])
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_the_two_commands_are_those_of_ci(blocks: list[Any], root: Path) -> None:
    first = next(block for block in blocks if block.language == "bash")
    assert [line.partition("#")[0].strip() for line in first.lines] == [
        "pip install uv && uv run tools/quickstart.py",  # tests/conftest.py runs it on less text, in two test files
        "uv run pytest",
    ]
    stages = (root / ".ci" / "run").read_text()
    assert "pip install --quiet uv" in stages
    parts = re.findall(r"uv run --no-sync pytest ([^|>]*)", stages.replace("\\\n", " "))
    named = [word for part in parts for word in part.split() if not word.startswith("-")]
    assert sorted(named) == ["packages/codegemm-" + each for each in ("eval", "kernels", "quant", "runtime")] + [
        "tests"
    ]


def test_the_steps(blocks: list[Any], reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (steps,) = [block for block in blocks if "codegemm-quant" in block.text]
    (snippet,) = [block for block in blocks if block.language == "python"]
    said: dict[str, Any] = {}
    for line in steps.lines:
        program, command, *arguments = shlex.split(line, comments=True)
        arguments += shlex.split(LITTLE.get(command, ""))
        if command == "convert":
            published(reader / "DIR", reader / "SRC")
        status = run(program, command, *arguments)
        printed = capsys.readouterr()
        assert status == 0, f"{line}\n{printed.err}"
        said[command] = json.loads(printed.out.splitlines()[-1])
    assert list(said) == ["quantize", "tune", "inspect", "generate", "convert", "ppl", "compare"]
    assert said["inspect"]["problems"] == []
    assert said["inspect"]["verified"]
    assert said["generate"]["tokens"] == 4
    assert said["ppl"]["divergence"] > 0
    assert [model["name"] for model in said["compare"]["models"]] == ["MODEL", "DIR", "DIR2"]
    names: dict[str, Any] = {}
    exec(compile(snippet.text, "README.md", "exec"), names)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"


def run(program: str, *arguments: str) -> Any:
    """A console script in this process, which has imported torch; returns its exit status."""
    try:
        return import_module(f"{program.replace('-', '_')}.cli").main(list(arguments))
    except SystemExit as ended:
        return ended.code


def published(ours: Path, folder: Path) -> None:
    """The same checkpoint as the published system writes it: with its own block of metadata alone."""
    folder.mkdir()
    for file in ours.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((ours / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def test_no_command_hides(blocks: list[Any], root: Path) -> None:
    """All of them stand in fenced blocks, where the tests above find them."""
    assert all(block.language in ("bash", "python", "text") for block in blocks)
    assert not [line for line in (root / "README.md").read_text().splitlines() if line.startswith("    ")]
    assert sum(block.language == "bash" for block in blocks) == 2
