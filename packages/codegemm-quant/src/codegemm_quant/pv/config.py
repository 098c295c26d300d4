"""What a user can set when tuning a quantised model or tokenising a text for it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from codegemm_kernels import BadInput

Part = Literal["codes", "codebooks", "others"]


@dataclass(frozen=True)
class TuneConfig:
    """Tune a quantised model against the dense one: codes, codebooks and scales, and all other parameters."""

    student: str
    """Folder of the quantised model to start from."""
    data: str
    """Training text: a folder written by `tokenize`, or what `tokenize` takes."""
    out: str
    """Folder to write the tuned checkpoint to; must not exist. Metrics and plots go to <out>.logs."""
    teacher: str | None = None
    """Folder or hub name of the dense model. Without it the model learns to predict the text itself."""
    freeze: tuple[Part, ...] = ()
    """What stays as it is: codes, codebooks (and scales), others (embeddings, norms, biases, head)."""
    steps: int = 1000
    """Optimiser steps."""
    tokens: int | None = None
    """Stop after this many training tokens if that is sooner than `steps`."""
    batch_size: int = 32
    """Windows in a step, over all processes."""
    micro_batch: int | None = None
    """Windows one process runs at once; default: its whole share of the batch."""
    sequence_length: int = 1024
    """Tokens in a window."""
    resample: float | None = None
    """Share of a window's tokens that are replaced in every step by what the teacher might have said in their place:
    a small text is not learnt by heart. Default: 0.5 with a teacher; 0 suits a text that is read only once."""
    learning_rate: float | None = None
    """Largest step of codebooks, scales and other parameters, with LAMB relative to the norm of each tensor.
    Default: 0.03 / sqrt(steps), which is near the published 3e-4 for the published 5700 steps."""
    code_learning_rate: float | None = None
    """The same for the latent weights that the codes follow. Default: 0.3 / sqrt(steps), at 1000 the published 1e-2."""
    beta1: float = 0.9
    """Memory of the mean gradient of codebooks, scales and other parameters."""
    code_beta1: float = 0.0
    """The same for the latent weights."""
    beta2: float = 0.95
    """Memory of the mean squared gradient, of all."""
    lamb: bool = True
    """Scale every tensor's step to its norm (LAMB); otherwise Adam."""
    warmup: int = 0
    """Steps over which learning rates rise from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What learning rates do after that."""
    max_code_change: float = 1e-2
    """Share of a matrix's vectors that may get new codes in a step; 1 re-encodes all: straight-through estimation."""
    trust_ratio: float | None = None
    """Largest change of a matrix in a step through its codes, relative to its norm; no limit if not given."""
    beam_size: int = 5
    """Hypotheses the code search keeps when there are several codebooks."""
    delta_decay: float = 0.0
    """How far the latent weights are pulled back to the quantised ones after a step: 0 not at all, 1 all the way."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of decoder blocks for the backward pass: less memory, a third more time."""
    eval_data: str | None = None
    """Text to evaluate on; default: every sixteenth window of the training text, which is then left out of training."""
    eval_windows: int = 64
    """Windows to evaluate on, at most."""
    eval_every: int = 100
    """Steps between evaluations; there is one at the start and one at the end in any case."""
    save_every: int = 200
    """Steps between saves of the state that --resume continues from."""
    seed: int = 0
    """Seed of the order of the windows and of the code search."""
    device: str | None = None
    """cpu, cuda or cuda:1; default: the first GPU, or else the CPU. Under torchrun each process takes its own."""
    resume: bool = False
    """Continue an interrupted run with the same settings, on any number of processes."""

    def __post_init__(self) -> None:
        counts = ["steps", "batch_size", "eval_windows", "eval_every", "save_every", "beam_size"]
        lowest = dict.fromkeys(counts, 1) | {"sequence_length": 2, "warmup": 0}
        lowest |= {name: 1 for name in ("tokens", "micro_batch") if getattr(self, name) is not None}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "code_beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} must be 0 or more and less than 1, not {getattr(self, name)}")
        for name in ("learning_rate", "code_learning_rate", "max_code_change", "trust_ratio"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise BadInput(f"{name} must be more than 0 and at most 1, not {getattr(self, name)}")
        if self.resample is not None and not 0 <= self.resample <= 1:
            raise BadInput(f"resample must lie between 0 and 1, not {self.resample}")
        if self.resample and self.teacher is None:
            raise BadInput("resample replaces tokens by what the teacher might have said: give a teacher")
        if not 0 <= self.delta_decay <= 1:
            raise BadInput(f"delta_decay must lie between 0 and 1, not {self.delta_decay}")
        if {"codes", "codebooks", "others"} <= set(self.freeze):
            raise BadInput("everything is frozen, so there is nothing to tune: leave something out of freeze")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: `steps`, or fewer when the token budget ends sooner."""
        if self.tokens is None:
            return self.steps
        return min(self.steps, max(1, self.tokens // (self.batch_size * self.sequence_length)))

    @property
    def resampled(self) -> float:
        """The share of tokens that are replaced."""
        if self.resample is None:
            return 0.0 if self.teacher is None else 0.5
        return self.resample

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of continuous parameters and of latent weights.

        A latent weight walks at random with the noise of its gradients, as far as rate * sqrt(steps); codes follow
        what stands out from that. A fixed rate suits one number of steps: at 100 steps 1e-2 moves no code at all.
        """
        root = math.sqrt(self.total_steps)
        continuous = 0.03 / root if self.learning_rate is None else self.learning_rate
        latent = 0.3 / root if self.code_learning_rate is None else self.code_learning_rate
        return min(continuous, 1.0), min(latent, 1.0)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result: what a resumed run must have in common with the interrupted one."""
        chosen = asdict(self)
        for name in ("out", "resume", "device", "micro_batch", "gradient_checkpointing", "save_every"):
            del chosen[name]
        chosen["freeze"] = sorted(self.freeze)
        return chosen


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn a text into a folder of token ids that `tune` reads without loading it."""

    data: str
    """A .txt, .jsonl or .parquet file, wikitext2, c4, slimpajama, or a hub data set owner/name or owner/name:config."""
    tokenizer: str
    """Folder or hub name of the model whose tokenizer is used."""
    out: str
    """Folder to write; must not exist."""
    max_tokens: int | None = None
    """Stop after this many tokens; all of the text if not given."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, not {self.max_tokens}")
