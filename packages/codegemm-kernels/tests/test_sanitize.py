"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random shapes, offsets and threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from codegemm_kernels import _C

SOURCE = Path(__file__).parent.parent


def run(*command: str | Path, timeout: int = 300) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/sanitize/run.cpp and the kernels."""
    folder = tmp_path_factory.mktemp("sanitize")
    run("cmake", "-S", SOURCE, "-B", folder, "-DCODEGEMM_SANITIZE=address,undefined")
    run("cmake", "--build", folder, "--parallel")
    return folder / "codegemm_sanitize"


@pytest.fixture
def instruction_sets() -> list[str]:
    """Those of this processor."""
    best = _C.cpu_features()
    found = [name for name in ("portable", "avx2", "avx512", "avx512vbmi", "neon") if _C.limit_cpu_features(name=name)]
    assert _C.limit_cpu_features(name=best)
    return found


def test_no_access_beside_a_buffer(sanitized: Path, instruction_sets: list[str]) -> None:
    assert instruction_sets[0] == "portable"
    for name in instruction_sets:
        assert run(sanitized, "40", "1", name) == "80\n"


def test_an_access_beside_a_buffer_is_caught(tmp_path: Path) -> None:
    """The check of the check: one row too many, and the program stops."""
    program = tmp_path / "overrun.cpp"
    program.write_text(
        "#include <cstdint>\n#include <memory>\n"
        "int main(int n, char**) { std::unique_ptr<uint16_t[]> y(new uint16_t[16]()); return y[15 + n]; }\n"
    )
    run("c++", "-fsanitize=address,undefined", program, "-o", tmp_path / "overrun")
    done = subprocess.run([tmp_path / "overrun"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
