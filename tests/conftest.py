"""The repository, and the scripts of tools/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def train_demo_model() -> ModuleType:
    return load_tool("train_demo_model")


@pytest.fixture(scope="session")
def quickstart_tool() -> ModuleType:
    return load_tool("quickstart")


def load_tool(name: str) -> ModuleType:
    """A script of tools/, imported without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
