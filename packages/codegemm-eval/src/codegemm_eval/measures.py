"""What can be measured of a checkpoint folder: a text, a task, speed. Each knows its setting, result and columns."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import torch

from codegemm_eval.harness import SUITES, Harness, Task
from codegemm_eval.perplexity import perplexity
from codegemm_eval.results import hardware, model_content
from codegemm_eval.speed import SpeedSetting, measure_speed
from codegemm_eval.text import Text
from codegemm_eval.tokens import tokenize
from codegemm_eval.windows import Protocol


class Subject:
    """A checkpoint folder or hub model whose parts are loaded when something asks for them."""

    def __init__(self, given: str, device: str | None, dtype: str, batch_size: int | None) -> None:
        from codegemm_runtime.loading import resolve_folder

        self.given, self.device, self.dtype, self.batch_size = given, device, dtype, batch_size
        self.folder = resolve_folder(given)
        # A download lies in a folder that is called by its commit.
        self.name = self.folder.resolve().name if Path(given).expanduser().exists() else given.rpartition("/")[2]

    @cached_property
    def content(self) -> str:
        """Digest of everything that decides what the model says."""
        return model_content(self.folder)

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype it is run in."""
        from codegemm_kernels.checkpoint import read_config

        config = read_config(self.folder)
        return self.dtype if self.dtype != "auto" else str(config.get("dtype") or config.get("torch_dtype"))

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        from codegemm_runtime.loading import load_model

        return load_model(self.folder, device=self.device, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from codegemm_runtime.loading import load_tokenizer

        return load_tokenizer(self.folder)

    def release(self) -> None:
        """Make room for the next model."""
        self.__dict__.pop("model", None)
        gc.collect()
        torch.cuda.empty_cache()


class Measure(Interface):
    """One cell of a table for every model."""

    @property
    def task(self) -> str:
        """What it is called in a results file."""

    def setting(self, subject: Subject) -> dict[str, Any]:
        """What decides the result, apart from the content of the model."""

    def run(self, subject: Subject) -> dict[str, Any]:
        """The result, as JSON."""

    def columns(self, result: dict[str, Any]) -> dict[str, float]:
        """What of the result stands in a table."""


@dataclass(frozen=True)
class TextMeasure:
    """Perplexity on a text and, with a teacher, the distance from its predictions."""

    text: Text
    protocol: Protocol
    teacher: Subject | None = None
    task: str = "perplexity"

    def setting(self, subject: Subject) -> dict[str, Any]:
        """The text by its content, the protocol, the teacher by its content, the dtype."""
        cut = asdict(self.protocol) | {"stride": self.protocol.stride or self.protocol.window}
        teacher = self._teacher_of(subject)
        other = {"teacher": teacher and teacher.content, "rule": self.text.name if self.text.rule else None}
        return {"text": self.text.digest, "dtype": subject.stored_dtype, **cut, **other}

    def run(self, subject: Subject) -> dict[str, Any]:
        """The fields of Perplexity, and what was measured on."""
        teacher = self._teacher_of(subject)
        tokens = tokenize(self.text, subject.tokenizer, self.protocol)
        windows = tokens.cut(self.protocol)
        taken = len(windows.inputs)
        chosen = "all" if taken == windows.available else "evenly spaced" if self.protocol.spread else "first"
        measured = perplexity(subject.model, windows, teacher=teacher and teacher.model, batch_size=subject.batch_size)
        return asdict(measured) | {
            "data": self.text.name,
            "window": self.protocol.window,
            "stride": self.protocol.stride or self.protocol.window,
            "windows": taken,
            "windows_in_text": windows.available,
            "windows_chosen": chosen,
            "bos": {"text": "start of the text", "window": "start of every window"}.get(tokens.bos, "none"),
        }

    def columns(self, result: dict[str, Any]) -> dict[str, float]:
        """perplexity, divergence, top-1 agreement."""
        shown = {"perplexity": "perplexity", "divergence": "KL", "top1_agreement": "top-1 agreement"}
        return {f"{title} {self.text.name}": result[key] for key, title in shown.items() if result[key] is not None}

    def _teacher_of(self, subject: Subject) -> Subject | None:
        """The teacher, None for the teacher itself."""
        return None if self.teacher is None or self.teacher.content == subject.content else self.teacher


@dataclass(frozen=True)
class TaskMeasure:
    """One task of lm-eval."""

    harness: Harness
    chosen: Task

    @property
    def task(self) -> str:
        """lm-eval's name."""
        return self.chosen.name

    def setting(self, subject: Subject) -> dict[str, Any]:
        """Examples, limit, options and dtype."""
        return self.harness.settings(self.chosen) | {"dtype": subject.stored_dtype}

    def run(self, subject: Subject) -> dict[str, Any]:
        """{"metric", "value", "metrics"}."""
        from codegemm_runtime.loading import load_tokenizer

        # lm-eval changes the tokenizer it is given.
        return self.harness.run(self.chosen, subject.model, load_tokenizer(subject.folder), subject.batch_size)

    def columns(self, result: dict[str, Any]) -> dict[str, float]:
        """The main metric."""
        return {f"{self.task} ({result['metric']})": result["value"]}


@dataclass(frozen=True)
class SpeedMeasure:
    """Tokens a second."""

    speed: SpeedSetting
    task: str = "speed"

    def setting(self, subject: Subject) -> dict[str, Any]:
        """What is generated, and on what."""
        from codegemm_runtime.loading import choose_device

        device = torch.device("cuda") if subject.device == "auto" else choose_device(subject.device)
        return asdict(self.speed) | {"hardware": hardware(device), "dtype": subject.stored_dtype}

    def run(self, subject: Subject) -> dict[str, Any]:
        """The fields of Speed."""
        return asdict(measure_speed(subject.model, subject.tokenizer, self.speed))

    def columns(self, result: dict[str, Any]) -> dict[str, float]:
        """tokens/s."""
        return {"tokens/s": result["tokens_per_second"]}


def suite_means(columns: dict[str, float]) -> dict[str, float]:
    """Unweighted means over the tasks of each suite that is complete."""
    means = {}
    for suite, (tasks, _) in SUITES.items():
        found = [value for task in tasks for title, value in columns.items() if title.startswith(f"{task} (")]
        if len(tasks) > 1 and len(found) == len(tasks):
            means[f"{suite} mean"] = sum(found) / len(found)
    return means
