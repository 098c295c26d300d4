"""tools/bench_decode.py on a CPU: rows of every backend that needs no other package, a chart, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from codegemm_kernels import BadInput

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench_decode.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_rows_of_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    done = run(
        *("--shape", str(ROOT / "models" / "pylm-4m"), "--dtype", "float32", "--backends", "engine,dense,transformers"),
        *("--json", str(out), "--batch", "1", "2", "--prompt", "8", "--context", "16", "--tokens", "4", "--runs", "2"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows == json.loads(out.read_text())["rows"]
    timed = [row for row in rows if "batch" in row]
    assert [(row["backend"], row["batch"]) for row in timed] == [
        (backend, batch) for backend in ("engine", "dense", "transformers") for batch in (1, 2)
    ]
    for row in timed:
        assert row["tokens_per_second"] == pytest.approx(1000 * row["batch"] / row["ms_per_token"])
        assert row["floor_fraction"] > 0  # above 1 too: a model this small is read from a cache
        assert {"shape", "scheme", "context", "memory_bytes"} <= set(row)
    assert all(row["first_token_ms"] > 0 for row in rows if "prompt" in row)
    assert out.with_suffix(".png").stat().st_size > 1000


def test_what_it_refuses(bench_decode: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    folder = str(ROOT / "models" / "pylm-4m")
    for changes, message in (
        ({"shape": "gpt"}, "unknown shape 'gpt'"),
        ({"backends": "x"}, "unknown backends in 'x'"),
        ({"runs": 1}, "--runs must be at least 2"),
        ({"shape": folder, "context": (2040,)}, "2112 tokens are wanted"),
        ({"backends": "llama.cpp", "batch": (2,)}, "llama.cpp is timed with one sequence"),
        ({"backends": "llama.cpp", "shape": folder, "batch": (1,)}, "with a built-in shape"),
    ):
        with pytest.raises(BadInput, match=message):
            bench_decode.run(bench_decode.Bench(json=tmp_path / "x.json", device="cpu", **changes))
