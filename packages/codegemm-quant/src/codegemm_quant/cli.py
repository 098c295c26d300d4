"""The command `codegemm-quant`: quantize, tune, tokenize."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import tyro

from codegemm_kernels.errors import run_command
from codegemm_quant.config import QuantizeConfig
from codegemm_quant.pv.config import TokenizeConfig, TuneConfig


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


@dataclass(frozen=True)
class Tune(TuneConfig):
    """Tune a quantised model against the dense one: codes, codebooks and scales, and all other parameters."""

    student: tyro.conf.Positional[str]
    """Folder of the quantised model to start from."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> dict[str, Any] | None:
        """Tune and return the JSON object; None in all processes but the first."""
        from codegemm_quant.pv.tune import tune

        return tune(TuneConfig(**{field.name: getattr(self, field.name) for field in fields(TuneConfig)}))


@dataclass(frozen=True)
class Tokenize(TokenizeConfig):
    """Turn a text into a folder of token ids that `tune` reads without loading it."""

    data: tyro.conf.Positional[str]
    """A .txt, .jsonl or .parquet file, wikitext2, c4, slimpajama, or a hub data set owner/name or owner/name:config."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> dict[str, Any]:
        """Tokenise and return the JSON object."""
        from codegemm_quant.pv.tokens import tokenize

        return tokenize(TokenizeConfig(**{field.name: getattr(self, field.name) for field in fields(TokenizeConfig)}))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    commands: dict[str, Callable[..., Any]] = {"quantize": Quantize, "tune": Tune, "tokenize": Tokenize}
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="codegemm-quant", args=arguments)
    sys.exit(run_command(command.run, debug=command.debug))
