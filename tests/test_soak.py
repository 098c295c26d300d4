"""A short run of tools/soak.py, and what it must notice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from codegemm_kernels import BadInput
from codegemm_runtime.engine import Engine
from codegemm_runtime.generation import generate_text


@pytest.fixture(scope="module")
def checkpoint(road: dict[str, Any]) -> Path:
    return Path(road["checkpoint"])


def test_two_hundred_requests(soak_tool: Any, checkpoint: Path, tmp_path: Path) -> None:
    result = soak_tool.run(soak_tool.Soak(tmp_path / "soak.json", checkpoint, requests=200, prompts=12))
    assert result["wrong"] == 0, result["first_wrong"]
    assert set(result["kinds"]) == set(soak_tool.KINDS)
    assert abs(result["rss_growth"]) < 0.02
    assert result["latency"]["largest"] < 60
    written = json.loads((tmp_path / "soak.json").read_text())
    assert len(written["mebibytes"]) == len(written["milliseconds"]) == 200
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_it_notices_wrong_tokens(
    soak_tool: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Engine.generate

    def one_off(engine: Engine, *arguments: Any) -> Any:
        for step in generate(engine, *arguments):
            yield [(sequence, token + (sequence == 1)) for sequence, token in step]

    monkeypatch.setattr(Engine, "generate", one_off)
    result = soak_tool.run(soak_tool.Soak(tmp_path / "soak.json", checkpoint, requests=50, prompts=4))
    assert result["wrong"] > 0


def test_too_few(soak_tool: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 50"):
        soak_tool.run(soak_tool.Soak(tmp_path / "soak.json", checkpoint, requests=5))


def test_threads_take_turns(soak_tool: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Callers of one model at the same time, as in a server with threads: each gets its own answer."""
    served = soak_tool.open_run(soak_tool.Soak(tmp_path / "soak.json", checkpoint, prompts=6), checkpoint)
    wanted = [served.tokenizer.decode(soak_tool.greedy(served, i, 8), skip_special_tokens=True) for i in range(6)]
    made: dict[int, list[str]] = {}

    def ask(i: int) -> None:
        prompt = torch.tensor([served.prompts[i]])
        made[i] = [generate_text(served.model, served.tokenizer, prompt, 8).text for _ in range(3)]

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    for i, text in enumerate(wanted):
        assert all(answer and text.startswith(answer) for answer in made[i]) or not text
