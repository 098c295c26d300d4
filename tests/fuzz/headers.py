"""Coverage-guided fuzzing of safetensors headers and configs with atheris, which `make fuzz` brings.

A crash, a hang or any exception but CheckpointError ends it with the input that did it.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["codegemm_kernels"]):
    from codegemm_kernels.checkpoint import CheckpointMetadata, checkpoint_files, read_config, read_headers
    from codegemm_kernels.errors import CheckpointError

FOLDER = Path(tempfile.mkdtemp())


def one_input(data: bytes) -> None:
    """The same bytes as a header, a config and an index."""
    (FOLDER / "config.json").write_bytes(data)
    (FOLDER / "model.safetensors.index.json").write_bytes(data)
    (FOLDER / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    for read in (
        lambda: CheckpointMetadata.from_config(read_config(FOLDER)),
        lambda: checkpoint_files(FOLDER),
        lambda: read_headers([FOLDER / "model.safetensors"]),
    ):
        try:
            read()
        except CheckpointError:
            continue


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
