"""How the build looks for a CUDA compiler (packages/codegemm-kernels/cmake/cuda.cmake), on pretended machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "packages" / "codegemm-kernels" / "cmake" / "cuda.cmake"
SCRIPT = """
set(CMAKE_FIND_ROOT_PATH "${MACHINE}")  # stands for / where programs are looked for
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM ONLY)
include("${CUDA}")
codegemm_find_nvcc(nvcc)
message("found:${nvcc}")
"""


@pytest.fixture
def find(tmp_path):
    """Call with the value of CODEGEMM_CUDA and environment variables: what was found, relative to the machine's root,
    or the message of failure."""
    script, path = tmp_path / "find.cmake", tmp_path / "path"
    script.write_text(SCRIPT)
    path.mkdir()
    machine = tmp_path / "machine"
    machine.mkdir()

    def run(cuda: str, **environment: str) -> str:
        names = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
        clean = {key: value for key, value in os.environ.items() if key not in names}
        settings = {"CODEGEMM_CUDA": cuda, "MACHINE": machine, "CUDA": CUDA, "Python_EXECUTABLE": sys.executable}
        done = subprocess.run(
            ["cmake", *(f"-D{key}={value}" for key, value in settings.items()), "-P", script],
            env=clean | {"PATH": f"{path}:{clean['PATH']}"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = " ".join(done.stderr.split())
        if done.returncode:
            return said
        return said.rpartition("found:")[2].replace(f"{tmp_path}/", "")

    return run


def nvcc(folder: Path) -> Path:
    """An nvcc in `folder`/bin, of which nothing but its existence is asked."""
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    return compiler


def test_without_a_compiler_the_build_is_for_the_cpu(find):
    assert find("AUTO") == ""


def test_insisting_fails_and_says_what_to_do(find):
    said = find("ON")
    assert "CODEGEMM_CUDA=ON, but there is no nvcc" in said
    assert "CUDA_HOME" in said
    assert "CODEGEMM_CUDA=PIP" in said


@pytest.mark.parametrize("place", ["usr/local/cuda", "opt/cuda"])
@pytest.mark.parametrize("cuda", ["AUTO", "ON"])
def test_a_toolkit_that_is_not_on_the_path_is_found(find, tmp_path, place, cuda):
    nvcc(tmp_path / "machine" / place)
    assert find(cuda) == f"machine/{place}/bin/nvcc"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_toolkit_of_the_environment_comes_first(find, tmp_path, variable):
    nvcc(tmp_path / "machine" / "usr" / "local" / "cuda")
    nvcc(tmp_path / "machine" / "cuda-13.1")
    assert find("AUTO", **{variable: str(tmp_path / "machine" / "cuda-13.1")}) == "machine/cuda-13.1/bin/nvcc"


def test_a_compiler_that_was_named_is_not_looked_for(find, tmp_path):
    nvcc(tmp_path / "machine" / "usr" / "local" / "cuda")
    assert find("AUTO", CUDACXX="/elsewhere/nvcc") == "/elsewhere/nvcc"


def test_off_ignores_what_is_there(find, tmp_path):
    nvcc(tmp_path / "machine" / "usr" / "local" / "cuda")
    assert find("OFF") == ""


def test_the_compiler_from_pypi_is_taken_only_when_asked_for(find, tmp_path):
    """nvidia.cu13 is a namespace package of many distributions, here in two folders of which one has the compiler."""
    (tmp_path / "first" / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    nvcc(tmp_path / "second" / "nvidia" / "cu13")
    paths = f"{tmp_path / 'first'}:{tmp_path / 'second'}"
    assert find("PIP", PYTHONPATH=paths) == "second/nvidia/cu13/bin/nvcc"
    assert find("AUTO", PYTHONPATH=paths) == ""


def test_pip_without_the_packages_fails_and_says_what_to_do(find, tmp_path):
    nvcc(tmp_path / "machine" / "usr" / "local" / "cuda")
    (tmp_path / "only" / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    said = find("PIP", PYTHONPATH=str(tmp_path / "only"))
    assert "CODEGEMM_CUDA=PIP, but" in said
    assert "build with isolation" in said


def test_another_value_is_refused(find):
    assert "must be AUTO, ON, OFF or PIP, not 'yes'" in find("yes")
