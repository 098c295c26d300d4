"""The command `codegemm-quant`: quantize."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

import tyro

from codegemm_kernels.errors import run_command
from codegemm_quant.config import QuantizeConfig


@dataclass(frozen=True)
class Quantize(QuantizeConfig):
    """Compress a language model to codebook indices, calibrated on text."""

    model: tyro.conf.Positional[str]
    """Folder or hub name of a dense transformers model."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> dict[str, Any]:
        """Quantise and return the JSON object."""
        from codegemm_quant.ptq import quantize

        return quantize(QuantizeConfig(**{field.name: getattr(self, field.name) for field in fields(QuantizeConfig)}))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    command = tyro.extras.subcommand_cli_from_dict({"quantize": Quantize}, prog="codegemm-quant", args=arguments)
    sys.exit(run_command(command.run, debug=command.debug))
