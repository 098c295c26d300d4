"""The run: from a quantised checkpoint to a tuned one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from codegemm_kernels import BadInput, NumericalError
from codegemm_quant.loading import check_source, compute_dtype, fingerprint, load_dense
from codegemm_quant.pv.batches import open_batches
from codegemm_quant.pv.config import TuneConfig
from codegemm_quant.pv.divergence import Teacher, autocast, check_pair
from codegemm_quant.pv.metrics import Metrics
from codegemm_quant.pv.optimiser import PVOptimiser
from codegemm_quant.pv.processes import Processes, join_processes
from codegemm_quant.pv.state import Rows, StateStore
from codegemm_quant.pv.student import export_student, load_student
from codegemm_quant.subject import check_out

LOG_EVERY = 10
"""Steps between two looks at the losses: each waits for the GPU."""


def tune(config: TuneConfig) -> dict[str, Any] | None:
    """Tune the quantised model `config.student` and write the checkpoint `config.out`.

    Returns {"out", "steps", "seconds", "tokens_per_second", "start", "best", "end"}; the last three are
    {"step", "divergence", "perplexity"} of the evaluations, divergence only with a teacher. On GPUs also
    "peak_memory_bytes" of the process that needed most. None in all processes but the first. An interrupted run keeps
    its state in `<out>.work`. Raises BadInput for unusable input, NumericalError when the loss stops being finite.
    """
    with join_processes(config.device) as processes:
        run = _Run(config, processes)
        result = run.finish(run.train())
    return result if processes.leads else None


class _Run:
    """Everything of a run, and where it stands."""

    def __init__(self, config: TuneConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.out = Path(config.out)
        check_out(self.out)
        if config.teacher is not None:
            check_source(config.teacher)  # before a long text is tokenised
        self.micro = micro_batch(config, processes.size)
        self.student = load_student(
            Path(config.student), processes, gradient_checkpointing=config.gradient_checkpointing
        )
        longest = getattr(self.student.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and config.sequence_length > longest:
            raise BadInput(
                f"sequence_length {config.sequence_length} is more than the {longest} positions of the model"
            )
        self.dtype = compute_dtype(self.student.stored, processes.device)
        if self.dtype == torch.float16:  # gradients of a mean over many tokens are too small for fp16
            self.dtype = torch.bfloat16
        work = self.out.with_name(f"{self.out.name}.work")
        self.batches = open_batches(config, self.student, work, processes)
        self.teacher = self._load_teacher()
        settings = config.settings() | {
            "text": self.batches.fingerprint,
            "model": fingerprint(config.student, self.student.model.config),
        }
        self.store = StateStore.open(work, settings, processes, resume=config.resume)
        self.optimiser = PVOptimiser(self.student, config, processes)
        self.best = self.student.snapshot()
        self.evaluations: dict[str, dict[str, float]] = {}
        self.done, self.seconds = 0, 0.0
        if self.store.newest() is not None:
            progress = self.store.load(self._state())
            self.done, self.seconds, self.evaluations = (progress[key] for key in ("step", "seconds", "evaluations"))
            for matrix in self.student.matrices:
                matrix.refresh()
        self.metrics: Metrics | None = None
        if processes.leads:
            self.metrics = Metrics(self.out.with_name(f"{self.out.name}.logs"), self.done)

    def train(self) -> float:
        """All steps that are left; returns the seconds they took, with those before an interruption."""
        config, total = self.config, self.config.total_steps
        started = time.monotonic() - self.seconds
        if not self.evaluations:
            self._evaluate("start")
        pending: list[Tensor] = []
        logged = time.monotonic()
        with self._progress(total) as bar:
            for number in range(self.done + 1, total + 1):
                torch.manual_seed((config.seed * 1_000_003 + number) * self.processes.size + self.processes.rank)
                loss = self._gradients(number)
                pending.append(torch.stack([loss, self.optimiser.step(number)]))
                if number % LOG_EVERY == 0 or number in (1, total) or self._due(number):
                    self._log(pending, number, time.monotonic() - logged, bar)
                    pending, logged = [], time.monotonic()
                if number == total or number % config.eval_every == 0:
                    self._evaluate("end" if number == total else "last")
                    logged = time.monotonic()
                self.done, self.seconds = number, time.monotonic() - started
                if number % config.save_every == 0 and number < total:
                    self.store.save(number, self._state(), {"seconds": self.seconds, "evaluations": self.evaluations})
                    logged = time.monotonic()
                bar.update()
        return time.monotonic() - started

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the best state as a checkpoint, close the books and say how it went."""
        start, best = self.evaluations["start"], self.evaluations["best"]
        report: dict[str, Any] = {key: {"before": start[key], "after": best[key]} for key in start if key != "step"}
        report["measured_on"] = "its evaluation text, which it did not train on"
        export_student(self.student, self.best, self.out, self.processes, report)
        if self.metrics is not None:
            self.metrics.close()
        self.store.close()
        tokens = self.config.total_steps * self.config.batch_size * self.config.sequence_length
        told: dict[str, Any] = {name: self.evaluations[name] for name in ("start", "best", "end")}
        if self.processes.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(), device=self.processes.device)
            told["peak_memory_bytes"] = int(self.processes.gather(peak).max())
        return {
            "out": str(self.out),
            "steps": self.config.total_steps,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **told,
        }

    def _load_teacher(self) -> Teacher | None:
        if self.config.teacher is None:
            return None
        model, _ = load_dense(self.config.teacher)
        check_pair(self.student.model, model)
        return Teacher(model.to(compute_dtype(model.dtype, self.processes.device)), self.processes)

    def _due(self, number: int) -> bool:
        return number % self.config.eval_every == 0 or number % self.config.save_every == 0

    def _gradients(self, number: int) -> Tensor:
        """Forward and backward over this process's share of a batch; returns the mean loss of the whole batch."""
        share = self.batches.train(number, self.processes).to(self.processes.device)
        chances = self.batches.chances(number, self.processes)
        micros = list(zip(share.split(self.micro), chances.split(self.micro), strict=True))
        total = torch.zeros((), device=self.processes.device)
        for tokens, chance in micros:
            with autocast(self.processes.device, self.dtype):
                if self.teacher is not None and self.config.resampled:
                    tokens = self.teacher.resampled(tokens, chance, self.config.resampled)
                divergence, nll = self.student.learner(tokens, self.teacher).unbind()
            loss = (nll if self.teacher is None else divergence) / len(micros)
            loss.backward()
            total += loss.detach()
        return self.processes.sum(total) / self.processes.size

    @torch.no_grad()
    def _evaluate(self, name: str) -> None:
        """Judge the values as they would be stored, remember the outcome under `name`, and the best state."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        with self.student.as_stored(), autocast(self.processes.device, self.dtype):
            for tokens, counted in self.batches.evaluation(self.micro, self.processes):
                losses = self.student.learner(tokens.to(self.processes.device), self.teacher)
                weight = counted * torch.ones(1, device=losses.device)
                sums += torch.cat([losses * weight, weight]).double()
        divergence, nll, windows = self.processes.sum(sums).tolist()
        if not math.isfinite(divergence + nll):
            raise NumericalError(f"the loss on the evaluation text is not finite ({name} of the run): check the models")
        step = 0 if name == "start" else self.done + 1
        found = {"step": step, "divergence": divergence / windows, "perplexity": _exp(nll / windows)}
        judged = "perplexity" if self.teacher is None else "divergence"
        if self.teacher is None:
            del found["divergence"]
        self.evaluations[name] = found
        best = self.evaluations.get("best")
        if best is None or found[judged] < best[judged]:
            self.evaluations["best"] = found
            for key, (value, _) in self.student.tensors().items():
                self.best[key].copy_(value)
        if self.metrics is not None:
            self.metrics.add(found)
            tqdm.write(", ".join(f"{key} {value:.5g}" for key, value in found.items()), file=sys.stderr)

    def _log(self, pending: list[Tensor], number: int, seconds: float, bar: tqdm[None]) -> None:
        """Record the steps up to `number`. Raises NumericalError when a loss was not finite."""
        speed = len(pending) * self.config.batch_size * self.config.sequence_length / seconds
        first = number - len(pending) + 1
        for step, (loss, changed) in enumerate(torch.stack(pending).tolist(), first):
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the loss is not finite in step {step}: lower learning_rate or code_learning_rate, or add warmup"
                )
            if self.metrics is not None:
                rate = self.optimiser.rate(step)
                record = {
                    "step": step,
                    "loss": loss,
                    "codes_changed": changed,
                    "rate": rate,
                    "tokens_per_second": speed,
                }
                self.metrics.add(record)
        bar.set_postfix(loss=f"{loss:.4f}", codes=f"{changed:.2%}", tokens_per_second=f"{speed:.0f}", refresh=False)

    def _state(self) -> Rows:
        rows = self.student.tensors()
        best = {f"best.{name}": (value, rows[name][1]) for name, value in self.best.items()}
        return {f"model.{name}": entry for name, entry in rows.items()} | self.optimiser.state() | best

    @contextmanager
    def _progress(self, total: int) -> Iterator[tqdm[None]]:
        hidden = not self.processes.leads
        with tqdm(total=total, initial=self.done, desc="tune", unit="step", disable=hidden, dynamic_ncols=True) as bar:
            yield bar


def micro_batch(config: TuneConfig, processes: int) -> int:
    """Windows that a process runs at once. Raises BadInput when the batch cannot be shared evenly."""
    if config.batch_size % processes:
        raise BadInput(
            f"a batch of {config.batch_size} windows cannot be shared by {processes} processes: "
            "choose a batch_size that they divide"
        )
    share = config.batch_size // processes
    micro = share if config.micro_batch is None else config.micro_batch
    if share % micro:
        raise BadInput(
            f"{share} windows a process cannot be run {micro} at a time: choose a micro_batch that divides {share}"
        )
    return micro


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 709 else math.inf
