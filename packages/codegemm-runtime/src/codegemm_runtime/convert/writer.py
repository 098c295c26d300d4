"""A checkpoint folder written tensor by tensor: one shard in memory, and a name only when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from codegemm_kernels.checkpoint import INDEX_FILE, SINGLE_FILE
from codegemm_kernels.errors import BadInput

SHARD_BYTES = 2 << 30


class FolderWriter:
    """Collects tensors into shards beside `out`; `publish` gives the folder its name. Leaves nothing otherwise."""

    def __init__(self, out: Path) -> None:
        """Raises BadInput when `out` exists."""
        if out.exists():
            raise BadInput(f"{out} exists: choose another folder or remove it")
        self.out = out
        self.building = out.with_name(f".{out.name}.partial")
        self.total_bytes = 0
        self._shard: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> FolderWriter:
        shutil.rmtree(self.building, ignore_errors=True)
        try:
            self.building.mkdir(parents=True)
        except OSError as error:
            raise self._not_written(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.building, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, BadInput):
            raise self._not_written(error) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; a full shard goes to disk."""
        if self._shard and self._pending_bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self, config: Mapping[str, Any]) -> Path:
        """Write the last shard, the index and config.json; returns the folder, still under its temporary name."""
        self._flush()
        if len(self._shards) == 1:
            self._file(0).rename(self.building / SINGLE_FILE)
        else:
            weight_map: dict[str, str] = {}
            for i, names in enumerate(self._shards):
                file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
                self._file(i).rename(self.building / file)
                weight_map |= dict.fromkeys(names, file)
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.building / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        (self.building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return self.building

    def publish(self) -> None:
        """Give the finished folder its name."""
        self.building.rename(self.out)

    def _not_written(self, error: BaseException) -> OSError:
        return OSError(f"cannot write {self.out} ({error}): make room or choose another folder")

    def _flush(self) -> None:
        save_file(self._shard, self._file(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._shard))
        self._shard, self._pending_bytes = {}, 0

    def _file(self, shard: int) -> Path:
        return self.building / f"shard-{shard}.safetensors"
