"""Sums of weight files: written, checked by us and by sha256sum, and every way in which they can fail."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codegemm_kernels import CheckpointError
from codegemm_kernels.checksums import SUMS_FILE, checksum_problems, write_checksums

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(FILES):
        save_file({f"t{i}": torch.arange(1000.0) + i}, tmp_path / name)
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(FILES)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checksum_problems(tmp_path) is None
    write_checksums(tmp_path)
    return tmp_path


def test_sound_files_pass(folder: Path) -> None:
    assert checksum_problems(folder) == []
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=folder, check=True)


def flip_a_bit(folder: Path) -> None:
    path = folder / FILES[1]
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def forget_a_file(folder: Path) -> None:
    path = folder / SUMS_FILE
    path.write_text(path.read_text().splitlines()[0] + "\n")


def list_a_stranger(folder: Path) -> None:
    path = folder / SUMS_FILE
    path.write_text(path.read_text() + f"{'0' * 64}  ../passwords\n")


def garble(folder: Path) -> None:
    (folder / SUMS_FILE).write_bytes(b"\xff\x00 no sums")


def swell(folder: Path) -> None:
    (folder / SUMS_FILE).write_text("x" * (2 << 20))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (flip_a_bit, f"{FILES[1]} is not the file whose checksum is in {SUMS_FILE}"),
        (forget_a_file, f"{FILES[1]} has no checksum in {SUMS_FILE}"),
        (list_a_stranger, f"{SUMS_FILE} lists ../passwords, which is no weight file"),
        (garble, f"{SUMS_FILE} is no list of checksums"),
        (swell, f"{SUMS_FILE} is no list of checksums"),
    ],
)
def test_faults_are_named(folder: Path, fault: Callable[[Path], None], sentence: str) -> None:
    fault(folder)
    problems = checksum_problems(folder)
    assert problems is not None
    assert [problem.startswith(sentence) for problem in problems] == [True]


def test_a_missing_weight_file_is_an_error(folder: Path) -> None:
    (folder / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checksum_problems(folder)
