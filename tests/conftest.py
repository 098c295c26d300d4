"""The repository, and the scripts of tools/ as modules."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--samples", "12", "--sequence-length", "128", "--epochs", "1", "--window", "128", "--windows", "8")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def train_demo_model() -> ModuleType:
    return load_tool("train_demo_model")


@pytest.fixture(scope="session")
def quickstart_tool() -> ModuleType:
    return load_tool("quickstart")


@pytest.fixture(scope="session")
def reproduce_tool() -> ModuleType:
    return load_tool("reproduce")


@pytest.fixture(scope="session")
def bench_quantize() -> ModuleType:
    return load_tool("bench_quantize")


@pytest.fixture(scope="session")
def quantize_curve() -> ModuleType:
    return load_tool("quantize_curve")


@pytest.fixture(scope="session")
def bench_decode() -> ModuleType:
    return load_tool("bench_decode")


@pytest.fixture(scope="session")
def soak_tool() -> ModuleType:
    return load_tool("soak")


@pytest.fixture(scope="session")
def read_docs() -> ModuleType:
    return load_tool("read_docs")


@pytest.fixture(scope="session")
def results_page() -> ModuleType:
    return load_tool("results_page")


@pytest.fixture(scope="session")
def quickstart() -> Callable[..., subprocess.CompletedProcess[str]]:
    """tools/quickstart.py as a user runs it, on so little text that it takes seconds."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--device", "cpu", *SMALL, *arguments]
        # One thread: on a busy machine the threads of such small products wait for each other, 33 s become 220 s.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)

    return run


@pytest.fixture(scope="session")
def road(
    quickstart: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """JSON of one such run."""
    out = tmp_path_factory.mktemp("quickstart")
    done = quickstart("--out", str(out), "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "stdout holds nothing but the JSON line"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def load_tool(name: str) -> ModuleType:
    """A script of tools/, imported without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
