"""What a user can set when quantising a model; the command line is generated from this."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from codegemm_kernels import BadInput, CodebookScheme


@dataclass(frozen=True)
class Effort:
    """What decides how long a run takes."""

    samples: int
    rounds: int
    tune_epochs: int
    model_epochs: int


EFFORT = {"cuda": Effort(256, 4, 4, 12), "cpu": Effort(64, 2, 0, 2)}
"""Where nothing else is said: 26 M parameters take about 20 seconds on a GPU and five minutes on two cores."""


@dataclass(frozen=True)
class QuantizeConfig:
    """Compress a language model to codebook indices, calibrated on text."""

    model: str
    """Folder or hub name of a dense transformers model."""
    data: str
    """Calibration text: a .txt, .jsonl or .parquet file, or wikitext2, c4, slimpajama."""
    out: str
    """Folder to write the checkpoint to; must not exist."""
    scheme: str = "m2v8g128"
    """Codebooks, vector length and scale group size, such as m1v4g128 or m2v8g-1."""
    bits: float | None = None
    """Bits a weight, such as 2.25: chooses a scheme for each layer by its sensitivity; --scheme then has no effect."""
    dry_run: bool = False
    """Only say what the run would make and take: sizes, bits, memory, time."""
    samples: int | None = None
    """Number of calibration windows; default 256, on a CPU 64."""
    sequence_length: int = 1024
    """Tokens in a calibration window."""
    device: str | None = None
    """cpu, cuda or cuda:1; default: the first GPU, or else the CPU."""
    seed: int = 0
    """Seed of every random choice."""
    resume: bool = False
    """Continue an interrupted run with the same settings."""
    skip: tuple[str, ...] = ()
    """Linear layers to leave dense: patterns of module names, such as '*.down_proj'."""
    rounds: int | None = None
    """Alternations of least squares and code sweeps for each matrix; default 4, on a CPU 2."""
    damping: float = 0.01
    """Share of the mean diagonal of H added to its diagonal."""
    tune_epochs: int | None = None
    """Passes over the windows that tune each block's codebooks, scales and norms; default 4, on a CPU 0 (none)."""
    tune_learning_rate: float = 4e-3
    """Largest step of the block tuning, relative to the size of each parameter."""
    model_epochs: int | None = None
    """Passes over the windows that tune all blocks together against the dense model; default 12, on a CPU 2."""
    model_learning_rate: float = 2e-3
    """Largest step of the whole model's tuning, relative to the size of each parameter."""

    def __post_init__(self) -> None:
        CodebookScheme.parse(self.scheme)
        lowest = {"samples": 1, "sequence_length": 2, "rounds": 0, "tune_epochs": 0, "model_epochs": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise BadInput(f"{name} must be at least {low}, not {value}")
        if self.bits is not None and not 1 < self.bits < 8:
            raise BadInput(f"bits must lie between 1 and 8, not {self.bits}")
        for name in ("damping", "tune_learning_rate", "model_learning_rate"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput(f"{name} must lie between 0 and 1, not {getattr(self, name)}")

    def effort(self, device: str) -> Effort:
        """What was chosen, completed by the defaults of a kind of device: "cpu" or "cuda"."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Effort)}
        return replace(EFFORT[device], **{name: value for name, value in chosen.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result: what a resumed run must have in common with the interrupted one."""
        chosen = asdict(self)
        for name in ("out", "resume", "device", "dry_run"):
            del chosen[name]
        chosen["skip"] = list(self.skip)
        return chosen
