"""Which kernels a processor gets, and those of another processor in an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from codegemm_kernels import _C

SOURCE = Path(__file__).parent.parent
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.parametrize(("name", "found"), [("portable", "portable"), ("abacus", None), ("", None)])
def test_the_environment_names_a_lesser_instruction_set(name: str, found: str | None) -> None:
    script = "from codegemm_kernels.ops import available_kernels; print(available_kernels()[0])"
    environment = os.environ | {"CODEGEMM_CPU": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (found or _C.cpu_features())


@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="needs g++-aarch64-linux-gnu and qemu-user-static")
def test_arm_kernels_in_an_emulator(tmp_path: Path) -> None:
    program = tmp_path / "arm"
    files = [SOURCE / "tests" / "sanitize" / "run.cpp", *sorted((SOURCE / "csrc" / "cpu").glob("*.cpp"))]
    options = ["-std=c++17", "-O2", "-static", f"-I{SOURCE / 'csrc'}", "-o", program, "-lpthread", "-ldl"]
    subprocess.run([str(each) for each in (COMPILER, *files, *options)], check=True, capture_output=True)
    for name in ("portable", "neon"):
        done = subprocess.run(
            [str(EMULATOR), str(program), "20", "1", name], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout) == (0, "40\n"), done.stderr
    assert subprocess.run([str(EMULATOR), str(program), "1", "1", "avx2"]).returncode == 2
