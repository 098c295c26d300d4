"""The command `codegemm-quant`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from codegemm_kernels.errors import run_command


def main() -> None:
    """Entry point of the console script."""
    import tyro

    from codegemm_quant.config import QuantizeConfig

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    command = Annotated[QuantizeConfig, tyro.conf.subcommand("quantize")]

    def run() -> dict[str, Any]:
        chosen = tyro.cli(command, prog="codegemm-quant", args=arguments, config=(tyro.conf.AvoidSubcommands,))
        from codegemm_quant.ptq import quantize

        return quantize(chosen)

    sys.exit(run_command(run, debug=debug))
