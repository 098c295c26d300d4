"""The state of a run on disk: what --resume continues from, on any number of processes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from codegemm_quant.progress_store import SETTINGS_FILE, check_resumed
from codegemm_quant.pv.processes import Processes

PROGRESS_FILE = "progress.json"

Rows = dict[str, tuple[Tensor, int | None]]
"""Tensors by name: the rows of each that are here, and how many there are in all processes; None: all hold the same."""


class StateStore:
    """The work folder of a run. A state appears under its name when it is whole; the one before is deleted then."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], processes: Processes, *, resume: bool) -> StateStore:
        """Start a run or continue one. Raises BadInput when there is work of other settings, or any without resume."""
        store, path = cls(folder, processes), folder / SETTINGS_FILE
        if store.newest() is not None:
            check_resumed(folder, settings, resume=resume)
        processes.wait()
        if processes.leads and store.newest() is None:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2))
        processes.wait()
        return store

    def newest(self) -> Path | None:
        """The last whole state, if there is one."""
        return max(self.folder.glob("state-*[0-9]"), default=None)

    def save(self, step: int, tensors: Rows, progress: dict[str, Any]) -> None:
        """Write the state after `step` steps; all processes take part. OSError where there is no room."""
        final = self.folder / f"state-{step:08}"
        building = final.with_name(f".{final.name}.partial")
        try:
            self._save(final, building, tensors, {"step": step, **progress})
            return
        except OSError as error:
            cause: BaseException = error
        except CheckpointException as error:  # which is no Exception, and its text is a traceback
            cause = next(iter(error.failures.values()))[0]
        shutil.rmtree(building, ignore_errors=True)
        raise OSError(f"cannot write {final} ({cause}): make room and continue with --resume") from cause

    def _save(self, final: Path, building: Path, tensors: Rows, progress: dict[str, Any]) -> None:
        if self.processes.leads:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        self.processes.wait()
        with _no_advice():
            save(self._joined(tensors), checkpoint_id=building, no_dist=self.processes.size == 1)
        if self.processes.leads:
            (building / PROGRESS_FILE).write_text(json.dumps(progress, indent=2))
            before = [path for path in self.folder.glob("state-*[0-9]") if path != final]
            shutil.rmtree(final, ignore_errors=True)
            building.replace(final)
            for path in before:
                shutil.rmtree(path)
        self.processes.wait()

    def load(self, tensors: Rows) -> dict[str, Any]:
        """Read the newest state into the tensors, in place; returns what `save` was told, and the step."""
        newest = self.newest()
        assert newest is not None
        with _no_advice():
            load(self._joined(tensors), checkpoint_id=newest, no_dist=self.processes.size == 1)
        progress: dict[str, Any] = json.loads((newest / PROGRESS_FILE).read_text())
        return progress

    def close(self) -> None:
        """Delete the work folder: the run is finished."""
        if self.processes.leads:
            shutil.rmtree(self.folder)

    def _joined(self, tensors: Rows) -> dict[str, Tensor]:
        return {
            name: here if total is None else self.processes.joined(here, total)
            for name, (here, total) in tensors.items()
        }


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
