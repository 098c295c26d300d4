"""Tasks of lm-eval on an already loaded model."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from codegemm_kernels import BadInput

CSR = ("winogrande", "piqa", "arc_easy", "arc_challenge", "hellaswag")
SUITES: dict[str, tuple[tuple[str, ...], int]] = {"csr": (CSR, 0), "mmlu": (("mmlu",), 5)}
"""Tasks and worked examples of the published results."""
CPU_BATCH = 8
_MAIN_METRICS = ("acc", "exact_match", "acc_norm", "word_perplexity", "bits_per_byte")
"""Of several, the first one stands in tables. Published common-sense averages are of acc, not acc_norm."""
_OURS = frozenset(
    {"model", "model_args", "tasks", "task_manager", "num_fewshot", "limit", "batch_size", "device", "pretrained"}
    | {"tokenizer", "dtype", "log_samples", "evaluation_tracker", "self", "kwargs"}
)
"""Arguments of lm-eval that have an option of their own here, or no use."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks of lm-eval to run, and how."""

    tasks: tuple[str, ...] = ()
    """lm-eval's names (tasks, groups, tags, patterns such as 'arc_*'), or .yaml files of tasks of your own."""
    suite: tuple[Literal["csr", "mmlu"], ...] = ()
    """csr: winogrande, piqa, arc_easy, arc_challenge and hellaswag without examples; mmlu: with 5 examples."""
    num_fewshot: int | None = None
    """Worked examples before each question; what the suite or the task says if not given."""
    limit: float | None = None
    """Questions of each task, or below 1 a share of them; all of them if not given."""
    include_path: Path | None = None
    """Folder with further task .yaml files."""
    options: tuple[str, ...] = ()
    """KEY=VALUE for any other argument of lm_eval.simple_evaluate or of its class HFLM, such as
    apply_chat_template=true or max_length=2048; a VALUE that is JSON is read as such."""


@dataclass(frozen=True)
class Task:
    """One thing for lm-eval to run."""

    name: str
    config: str | dict[str, Any]
    """Its name, or what its .yaml file says."""
    num_fewshot: int | None
    content: str | None
    """Digest of the .yaml file and its local data."""


class Harness:
    """Checked tasks and options. Raises BadInput for a task or option that lm-eval does not know."""

    def __init__(self, options: TaskOptions) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        known = (set(inspect.signature(each).parameters) - _OURS for each in (simple_evaluate, HFLM.__init__))
        self.evaluate_names, self.model_names = known
        self.options = dict(map(self._parse, options.options))
        self.limit = options.limit
        if self.limit is not None and self.limit <= 0:
            raise BadInput(f"a limit of {self.limit} questions leaves nothing to run: use 1 or more, or a share")
        wanted = [(name, options.num_fewshot) for name in options.tasks]
        for suite in options.suite:
            names, shots = SUITES[suite]
            wanted += [(name, shots if options.num_fewshot is None else options.num_fewshot) for name in names]
        named = any(not name.endswith(".yaml") for name, _ in wanted)
        # The index of lm-eval's own tasks takes five seconds, and a .yaml file does not need it.
        self.manager = TaskManager(
            include_path=None if options.include_path is None else str(options.include_path),
            include_defaults=named,
            metadata=self.options.get("metadata"),
        )
        self.tasks = [task for name, shots in wanted for task in self._find(name, shots)]

    def settings(self, task: Task) -> dict[str, Any]:
        """What decides the result, apart from the model."""
        content = {} if task.content is None else {"content": task.content}
        return {"num_fewshot": task.num_fewshot, "limit": self.limit, **self.options, **content}

    def run(self, task: Task, model: Any, tokenizer: Any, batch_size: int | None = None) -> dict[str, Any]:
        """{"metric", "value", "metrics": {task: {metric: value}}}: what stands for the task in a table, and everything.

        Without `batch_size` lm-eval finds the largest that fits a GPU. When memory ends, the task starts again with
        half the batch. Raises BadInput when one request alone does not fit, OSError when its data cannot be had.
        """
        on_gpu = model.device.type == "cuda"
        batch: int | str = batch_size or ("auto" if on_gpu else CPU_BATCH)
        while True:
            try:
                return self._evaluate(task, model, tokenizer, batch)
            except torch.OutOfMemoryError as error:
                if batch == 1:
                    raise BadInput(
                        f"one request of {task.name} does not fit in the memory of {model.device}: "
                        "use --device auto, or --options max_length=N to cut long requests"
                    ) from error
            except OSError as error:
                raise OSError(f"the data of the task {task.name} cannot be downloaded or read: {error}") from error
            torch.cuda.empty_cache()
            batch = batch // 2 if isinstance(batch, int) else CPU_BATCH
            print(f"out of memory: {task.name} again with {batch} requests at a time", file=sys.stderr)

    def _evaluate(self, task: Task, model: Any, tokenizer: Any, batch: int | str) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        of_model = {"softmax_dtype": "float32"} | self._only(self.model_names)
        limit = int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints its batch sizes
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, **of_model),
                tasks=[task.config],
                num_fewshot=task.num_fewshot,
                limit=limit,
                task_manager=self.manager,
                log_samples=False,
                **self._only(self.evaluate_names),
            )
        assert found is not None  # None is for all processes but the first
        metrics = {name: dict(map(_plain, each.items())) for name, each in found["results"].items()}
        name, value = _main(task.name, metrics)
        return {"metric": name, "value": value, "metrics": metrics}

    def _only(self, names: set[str]) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in names}

    def _parse(self, option: str) -> tuple[str, Any]:
        key, equals, value = option.partition("=")
        if key in _OURS or not equals or key not in self.evaluate_names | self.model_names:
            known = ", ".join(sorted(self.evaluate_names | self.model_names))
            raise BadInput(f"--options {option}: give KEY=VALUE with one of lm-eval's arguments: {known}")
        try:
            return key, json.loads(value)
        except json.JSONDecodeError:
            return key, value

    def _find(self, name: str, shots: int | None) -> list[Task]:
        if name.endswith(".yaml"):
            return [_local_task(Path(name), shots)]
        matches = self.manager.match_tasks([name])
        if not matches:
            raise BadInput(f"lm-eval knows no task {name}: see `lm-eval ls tasks`, or give a .yaml file")
        return [Task(match, match, shots, None) for match in sorted(matches)]


def _local_task(file: Path, shots: int | None) -> Task:
    """The task of a .yaml file, whose data files are looked for beside it too. Raises BadInput."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise BadInput(f"there is no task file {file}")
    try:
        config: dict[str, Any] = load_yaml(str(file), resolve_func=True)
    except Exception as error:  # of the YAML parser, or of the Python files that a !function line names
        raise BadInput(f"the task file {file} cannot be read: {error}") from error
    if not isinstance(config, dict) or "task" not in config:
        raise BadInput(f"the task file {file} has no line `task: NAME`")
    content = hashlib.sha256(file.read_bytes())
    listed = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(listed, dict):  # lm-eval would look in the current folder alone
        for split, data in listed.items():
            beside = file.parent / str(data)
            if beside.is_file():
                listed[split] = str(beside.resolve())
                content.update(beside.read_bytes())
    return Task(str(config["task"]), config, shots, content.hexdigest()[:16])


def _main(task: str, metrics: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """The metric that stands for a task in a table; for a tag, which has none itself, the mean over its tasks."""
    rows = [metrics[task]] if task in metrics else list(metrics.values())
    numbers = {key: value for key, value in rows[0].items() if isinstance(value, float) and "_stderr" not in key}
    names = sorted(numbers, key=lambda key: [*_MAIN_METRICS, key.partition(",")[0]].index(key.partition(",")[0]))
    if not names:
        raise BadInput(f"the task {task} has no metric that is a number")
    values = [row[names[0]] for row in rows if names[0] in row]
    return names[0].partition(",")[0], sum(values) / len(values)


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    """Numbers as floats, whatever library they are from; everything else as text."""
    key, value = item
    try:
        return key, value if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return key, str(value)
