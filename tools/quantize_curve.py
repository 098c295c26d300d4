"""Quantises a model in several schemes and draws what is lost against the bits that are kept: JSON and a chart."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """What to measure; the gap is ln(perplexity / perplexity of the dense model)."""

    model: str
    """Folder of the dense model."""
    data: str
    """Calibration text."""
    validation: str
    """Text for perplexity."""
    json: Path
    """File for all rows; the chart goes beside it as .png."""
    schemes: tuple[str, ...] = ("m1v8g128", "m2v8g-1", "m1v4g128", "m2v8g128", "m3v8g128", "m4v8g128")
    """Codebooks, vector length and scale group size."""
    sequence_length: int = 1024
    """Tokens in a calibration window."""
    window: int = 1024
    """Tokens in a window of validation text."""
    windows: int = 100
    """How many such windows."""
    device: str | None = None
    """Default: the first GPU, or else the CPU."""
    bits: tuple[float, ...] = (2.25,)
    """Budgets of bits a weight for which schemes are chosen layer by layer."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    from codegemm_kernels.errors import run_command

    command = tyro.cli(Curve)
    sys.exit(run_command(lambda: curve(command), debug=command.debug))


def curve(command: Curve) -> dict[str, Any]:
    """Measure all schemes; the file is written again after each."""
    from codegemm_eval.score import evaluate_folder
    from codegemm_quant import QuantizeConfig, quantize

    def perplexity(folder: str) -> float:
        measure = {"window": command.window, "windows": command.windows, "device": command.device}
        return float(evaluate_folder(folder, command.validation, **measure).perplexity)

    dense, rows = perplexity(command.model), []
    result: dict[str, Any] = {"command": " ".join(sys.argv), "model": Path(command.model).name}
    result |= {"dense_perplexity": dense, "rows": rows}
    ways: list[dict[str, Any]] = [{"scheme": scheme} for scheme in command.schemes]
    for way in [*ways, *({"bits": bits} for bits in command.bits)]:
        with tempfile.TemporaryDirectory() as folder:
            config = QuantizeConfig(
                model=command.model,
                data=command.data,
                out=f"{folder}/quantised",
                sequence_length=command.sequence_length,
                device=command.device,
                **way,
            )
            report = quantize(config)
            quantised = perplexity(config.out)
        kept = {key: report[key] for key in ("scheme", "bits_per_weight", "seconds", "effort", "stages")}
        rows.append(kept | {"perplexity": quantised, "gap": math.log(quantised / dense)})
        command.json.write_text(json.dumps(result, indent=2) + "\n")
    draw(result, command.json.with_suffix(".png"))
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """The chart of a result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(result["rows"], key=lambda row: row["bits_per_weight"])
    axes.plot([row["bits_per_weight"] for row in rows], [row["gap"] for row in rows], "o")
    for number, row in enumerate(rows):
        place, above = (row["bits_per_weight"], row["gap"]), number % 2 == 0
        beside = {"xytext": (4, 4) if above else (-4, -4), "ha": "left" if above else "right"}
        axes.annotate(row["scheme"], place, textcoords="offset points", va="center", fontsize=8, **beside)
    axes.margins(x=0.15)
    axes.set_yscale("log")
    axes.set_xlabel("stored bits a weight")
    axes.set_ylabel("ln(perplexity / dense perplexity)")
    axes.set_title(result["model"])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
