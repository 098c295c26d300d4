"""Registration without an import of ours, in fresh interpreters and every import order."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest

from codegemm_runtime import autoload

Run = Callable[..., subprocess.CompletedProcess[str]]

# Where the package is not installed but on PYTHONPATH, there is no entry point; torch's own call is imitated.
INSTALLED = any(point.value.startswith("codegemm_runtime") for point in entry_points(group="torch.backends"))
AUTOLOAD = "" if INSTALLED else "import torch, codegemm_runtime.autoload; codegemm_runtime.autoload.install()\n"


def test_registry_imported_first(run_python: Run) -> None:
    script = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # imports torch while it is half-run itself
import transformers.modeling_utils
assert "codegemm" in AUTO_QUANTIZER_MAPPING
"""
    result = run_python("-c", AUTOLOAD + script)
    assert result.returncode == 0, result.stderr


def test_without_torch_autoload_importing_us_registers(run_python: Run) -> None:
    script = """
import transformers.quantizers.auto as registry
assert "codegemm" not in registry.AUTO_QUANTIZER_MAPPING
import codegemm_runtime
assert "codegemm" in registry.AUTO_QUANTIZER_MAPPING
"""
    result = run_python("-c", script, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 0, result.stderr


def test_the_integration_imported_first(run_python: Run) -> None:
    """It imports the registry, whose watcher then meets it half-run."""
    script = """
import codegemm_runtime.hf
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "codegemm" in AUTO_QUANTIZER_MAPPING
"""
    result = run_python("-c", script)
    assert (result.returncode, result.stderr) == (0, "")


def test_half_run_registry_registers_at_a_later_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that itself triggered `import torch` is not complete when torch calls us."""
    complete = importlib.import_module(autoload.REGISTRY)
    watcher = autoload._RegistryWatcher()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, autoload.REGISTRY, ModuleType(autoload.REGISTRY))
        watcher.register_if_ready()
        assert not watcher.registered
    mapping = complete.AUTO_QUANTIZER_MAPPING
    monkeypatch.delitem(mapping, "codegemm", raising=False)
    assert watcher.find_spec("transformers.models.anything", None) is None
    assert watcher.registered
    assert mapping["codegemm"].__name__ == "CodeGemmQuantizer"


def test_plain_from_pretrained_without_importing_us(
    run_python: Run, make_checkpoint: Callable[..., Any], ids: Any
) -> None:
    checkpoint = make_checkpoint("qwen2")
    script = f"""
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(checkpoint.folder)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, *model(torch.tensor({ids.tolist()})).logits[0, -1, :3].tolist())
"""
    result = run_python("-c", AUTOLOAD + script)
    assert result.returncode == 0, result.stderr
    kind, *logits = result.stdout.split()
    assert kind == "CodebookLinear"
    expected = checkpoint.dense(ids).logits[0, -1, :3].tolist()
    assert [float(logit) for logit in logits] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_failing_registration_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    importlib.import_module(autoload.REGISTRY)
    monkeypatch.setitem(sys.modules, "codegemm_runtime.hf", None)  # importing it raises
    autoload._RegistryWatcher().register_if_ready()
    assert "registration with transformers failed" in caplog.text


def test_importing_us_is_silent_and_light(run_python: Run) -> None:
    script = """
import sys, time
start = time.perf_counter()
import codegemm_runtime
seconds = time.perf_counter() - start
heavy = {"torch", "transformers", "codegemm_kernels", "tyro", "numpy"} & set(sys.modules)
assert not heavy, heavy
start = time.perf_counter()
for _ in range(100):
    codegemm_runtime.autoload.install()
assert (time.perf_counter() - start) / 100 < 1e-3
assert sum(type(finder).__name__ == "_RegistryWatcher" for finder in sys.meta_path) == 1
"""
    result = run_python("-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_loader_that_takes_no_attributes_is_left_alone() -> None:
    class Frozen:
        __slots__ = ()

        def exec_module(self, module: ModuleType) -> None:
            raise AssertionError("not called")

    autoload._RegistryWatcher()._append_registration(Frozen())


def test_the_entry_point_costs_less_than_a_millisecond(run_python: Run) -> None:
    """All that torch does for it: importing and calling it in an interpreter that has what torch imports."""
    script = """
import logging, time, contextlib, importlib.abc, importlib.machinery, typing
from importlib.metadata import EntryPoint
point = EntryPoint("codegemm", "codegemm_runtime.autoload:install", "torch.backends")
start = time.perf_counter()
point.load()()
print(time.perf_counter() - start)
"""
    # Other work on the machine only adds to a time, so the smallest of several is the one to judge.
    assert min(float(run_python("-c", script).stdout) for _ in range(8)) < 1e-3


def test_public_names_are_there() -> None:
    import codegemm_runtime

    assert all(getattr(codegemm_runtime, name) is not None for name in codegemm_runtime.__all__)
    assert set(codegemm_runtime.__all__) <= set(dir(codegemm_runtime))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = codegemm_runtime.no_such_name


def test_register_is_idempotent() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from codegemm_runtime import CodeGemmConfig, register

    register()
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["codegemm"] is CodeGemmConfig
