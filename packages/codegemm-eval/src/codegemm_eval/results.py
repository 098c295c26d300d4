"""Results kept in a file: one line of JSON a measurement, found again by model content, task and setting."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels import BadInput

_PACKAGES = (
    *("codegemm-kernels", "codegemm-runtime", "codegemm-eval"),
    *("torch", "transformers", "tokenizers", "datasets", "lm-eval"),
)
_CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
"""Files of a checkpoint folder that decide what the model says."""


@dataclass(frozen=True)
class Cell:
    """One measurement of one model."""

    model: str
    """`model_content` of its folder."""
    task: str
    setting: dict[str, Any]
    """What decides the result, apart from the model."""
    result: dict[str, Any]
    run: dict[str, Any]
    """Where and when: date, name of the model, versions, commit, hardware."""


class ResultFile:
    """Measurements in a .jsonl file; of several with the same model, task and setting the last one counts."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput when the file holds something else."""
        self.path = path
        self.cells: dict[str, Cell] = {}
        if not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                cell = Cell(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise BadInput(f"{path} line {number} is no result ({error}): name another --results file") from error
            self.cells[_key(cell.model, cell.task, cell.setting)] = cell

    def find(self, model: str, task: str, setting: dict[str, Any]) -> Cell | None:
        """The measurement of this model, task and setting, if there is one."""
        return self.cells.get(_key(model, task, setting))

    def add(self, cell: Cell) -> None:
        """Append with one write, so that a kill leaves whole lines and several processes may share a file."""
        line = json.dumps(vars(cell), sort_keys=True) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        self.cells[_key(cell.model, cell.task, cell.setting)] = cell


def _key(model: str, task: str, setting: dict[str, Any]) -> str:
    return json.dumps([model, task, setting], sort_keys=True)


def model_content(folder: Path) -> str:
    """Digest of weights, config and tokenizer: the same for a copy of a folder, another once a byte has changed."""

    def digest(file: Path) -> str:
        with file.open("rb") as content:
            return f"{file.name} {file_digest(content, 'sha256').hexdigest()}"

    files = sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})
    with ThreadPoolExecutor() as threads:
        return sha256("\n".join(threads.map(digest, files)).encode()).hexdigest()[:16]


def describe_run(name: str, device: torch.device) -> dict[str, Any]:
    """Where and when a measurement of the model called `name` is taken."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": name,
        "versions": {"python": platform.python_version()} | {name: _or_none(version, name) for name in _PACKAGES},
        "commit": commit(),
        "hardware": hardware(device),
    }


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of this source tree, with -dirty when files differ from it; None for an installed wheel."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not the repository that a virtual environment happens to be in
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _or_none(find: Callable[[str], str], name: str) -> str | None:
    try:
        return find(name)
    except PackageNotFoundError:
        return None
