"""The fast CUDA kernels, run from their sources on the CPU (tests/emulation), against exact arithmetic.

The GPU-less check of indexing, barriers and layouts: fibers are scheduled at random, copies finish late, shared memory
starts as NaN. It needs the CUDA headers and a C++ compiler, not nvcc and not a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "emulation"
CSRC = Path(__file__).parent.parent / "csrc"


def cuda_headers() -> Path | None:
    """The folder with cuda_fp16.h, of the toolkit that CUDA_HOME or nvcc names."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    homes += sorted(str(path) for path in Path("/usr/local").glob("cuda-*"))
    return next((Path(h) / "include" for h in homes if h and (Path(h) / "include/cuda_fp16.h").is_file()), None)


HEADERS, COMPILER = cuda_headers(), shutil.which("g++")

# Without the headers or the compiler there is nothing to build and the tests are not collected.
MODES = [1, 0] if HEADERS and COMPILER else []


@pytest.mark.parametrize("clusters", MODES, ids=lambda c: "sm90" if c else "sm80")
def test_emulated_kernels_are_exact(tmp_path: Path, clusters: int) -> None:
    """No case fails with clusters and bulk copies (sm_90), nor with cp.async alone (sm_80)."""
    program = tmp_path / "emulated"
    flags = ["-std=c++17", "-O0", "-fno-strict-aliasing", f"-DCODEGEMM_HAS_CLUSTERS={clusters}"]
    includes = [f"-I{HERE}", f"-I{CSRC}", f"-isystem{HEADERS}"]
    subprocess.run([str(COMPILER), *flags, *includes, str(HERE / "run.cpp"), "-o", str(program)], check=True)
    result = subprocess.run([str(program), "12", "8"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
