"""The work folder of a run in progress: settings, and a file for each finished block, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codegemm_kernels import BadInput
from codegemm_quant.parallel import ALONE, Team

SETTINGS_FILE = "settings.json"


class ProgressStore:
    """Finished blocks of an interrupted run; `open` decides whether they may be used."""

    def __init__(self, folder: Path, team: Team = ALONE) -> None:
        self.folder = folder
        self._team = team

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], *, resume: bool, team: Team = ALONE) -> ProgressStore:
        """Start a run or continue one; a folder without a finished block is a fresh start. Only the leader writes.

        Raises BadInput when there is work of other settings, or any without resume.
        """
        path = folder / SETTINGS_FILE
        if path.exists() and any(folder.glob("block-*.safetensors")):
            check_resumed(folder, settings, resume=resume)
        elif team.leads:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.json"):  # of a run that finished no block
                old.unlink()
            _write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=2)))
        team.wait()
        return cls(folder, team)

    def remember(self, name: str, value: Callable[[], Any]) -> Any:
        """What was found out under this name, or else `value()`, which the leader of the team finds out for all."""
        path = self.folder / f"{name}.json"
        if self._team.leads and not path.exists():
            text = json.dumps(value(), indent=2)
            _write_whole(path, lambda temporary: temporary.write_text(text))
        self._team.wait()
        return json.loads(path.read_text())

    def save(self, index: int, tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Record a finished block. The tensors' file appears last and marks the block as done."""
        if self._team.leads:
            _write_whole(self._report(index), lambda temporary: temporary.write_text(json.dumps(report, indent=2)))
            _write_whole(self._tensors(index), lambda temporary: save_file(tensors, temporary))
        self._team.wait()

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and report of a finished block, or None when it is not finished."""
        if not self._tensors(index).exists():
            return None
        try:
            return load_file(self._tensors(index)), json.loads(self._report(index).read_text())
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise BadInput(f"{self._tensors(index)} is damaged ({error}): delete it and resume again") from error

    def _tensors(self, index: int) -> Path:
        return self.folder / f"block-{index:04}.safetensors"

    def _report(self, index: int) -> Path:
        return self.folder / f"block-{index:04}.json"


def check_resumed(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Raise BadInput unless the run that left its work and settings in `folder` may be continued with these."""
    if not resume:
        raise BadInput(f"{folder} holds an interrupted run: continue it with --resume or delete the folder")
    before = json.loads((folder / SETTINGS_FILE).read_text())
    changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if changed:
        told = ", ".join(f"{key} was {before.get(key)!r}, now {settings.get(key)!r}" for key in changed)
        raise BadInput(
            f"cannot resume the run in {folder}: {told}; use the same settings, or delete the folder to start again"
        )


def _write_whole(path: Path, write: Any) -> None:
    """Write beside and rename, so that a kill or a full disk leaves no half file under the final name."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path} ({error}): make room and continue with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)
