"""SHA-256 sums of a checkpoint's weight files, in a file that `sha256sum --check` reads too."""

from __future__ import annotations

import re
from hashlib import file_digest
from pathlib import Path

from codegemm_kernels.checkpoint import checkpoint_files

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MAX_BYTES = 1 << 20


def write_checksums(folder: Path) -> None:
    """Write the sums of the safetensors files of a finished folder. Raises CheckpointError when there are none."""
    lines = [f"{_digest(file)}  {file.name}\n" for file in checkpoint_files(folder)]
    (folder / SUMS_FILE).write_text("".join(lines))


def checksum_problems(folder: Path) -> list[str] | None:
    """What does not fit the sums kept in `folder`, a sentence each; None when it keeps none. Reads every weight file.

    Raises CheckpointError when the folder's weight files cannot be found.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        return [f"{SUMS_FILE} is no list of checksums: get it again"]
    lines = [_LINE.fullmatch(line) for line in path.read_text(errors="replace").splitlines()]
    sums = {line[2]: line[1] for line in lines if line is not None}
    if len(sums) != len(lines):
        return [f"{SUMS_FILE} is no list of checksums: get it again"]
    problems = []
    for file in checkpoint_files(folder):
        wanted = sums.pop(file.name, None)
        if wanted is None:
            problems.append(f"{file.name} has no checksum in {SUMS_FILE}: get both again")
        elif _digest(file) != wanted:
            problems.append(f"{file.name} is not the file whose checksum is in {SUMS_FILE}: get or write it again")
    problems += [f"{SUMS_FILE} lists {name}, which is no weight file of the folder: get it again" for name in sums]
    return problems


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
