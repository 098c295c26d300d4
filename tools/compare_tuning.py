"""What updating codes is worth: the P step alone, straight-through alone and full PV-tuning of a checkpoint, as JSON.

Every way gets the same steps and default rates. The gap is ln(perplexity / perplexity of the dense model) on text that
no way has seen.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WAYS: dict[str, dict[str, Any]] = {
    "PV": {},
    "P step alone": {"freeze": ("codes",)},
    "straight-through": {"max_code_change": 1.0},
    "straight-through, nothing else": {"max_code_change": 1.0, "freeze": ("codebooks", "others")},
}


@dataclass(frozen=True)
class Compare:
    """What to compare."""

    students: tuple[Path, ...]
    """Folders of quantised checkpoints."""
    teacher: str
    """Folder or hub name of the dense model."""
    data: str
    """Training text, as for `codegemm-quant tune`."""
    valid: str
    """Text for the gaps: first 100 windows of it."""
    out: Path
    """Folder for the checkpoints and their logs."""
    json: Path
    """File for the result; written anew after every run."""
    steps: int = 400
    """Optimiser steps of every run."""
    batch_size: int = 32
    """Windows in a step."""
    window: int = 1024
    """Tokens in a window, in training and evaluation."""
    windows: int = 100
    """Windows of `valid`."""
    device: str | None = None
    """Default: the first GPU, or else the CPU."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    from codegemm_kernels.errors import run_command

    command = tyro.cli(Compare)
    sys.exit(run_command(lambda: compare(command), debug=command.debug))


def compare(command: Compare) -> dict[str, Any]:
    """Tune and score every student in every way; returns what is written to the file."""
    from codegemm_quant.loading import choose_device
    from codegemm_quant.pv.config import TuneConfig
    from codegemm_quant.pv.tune import tune

    device = choose_device(command.device)
    dense = score(command, command.teacher, device)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "teacher": command.teacher,
        "perplexity_dense": dense,
        "rows": [],
    }
    for student in command.students:
        start = score(command, str(student), device)
        result["rows"].append({"student": student.name, "way": "start", "gap": math.log(start / dense)})
        for way, settings in WAYS.items():
            out = command.out / f"{student.name}-{way.replace(', ', '-').replace(' ', '-')}"
            told = tune(
                TuneConfig(
                    student=str(student),
                    teacher=command.teacher,
                    data=command.data,
                    out=str(out),
                    steps=command.steps,
                    batch_size=command.batch_size,
                    sequence_length=command.window,
                    eval_every=max(1, command.steps // 10),
                    device=str(device),
                    **settings,
                )
            )
            assert told is not None  # one process
            gap = math.log(score(command, str(out), device) / dense)
            print(f"{student.name}, {way}: gap {gap:.4f} after {told['seconds']:.0f} s", file=sys.stderr)
            result["rows"].append({"student": student.name, "way": way, "gap": gap, **told})
            command.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def score(command: Compare, folder: str, device: torch.device) -> float:
    """Perplexity of a checkpoint on the held-out text."""
    from codegemm_eval.score import evaluate_folder

    options = {"window": command.window, "windows": command.windows, "device": str(device)}
    return float(evaluate_folder(folder, command.valid, **options).perplexity)


if __name__ == "__main__":
    main()
