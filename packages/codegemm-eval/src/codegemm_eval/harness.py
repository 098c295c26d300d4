"""Tasks of lm-eval on an already loaded model, and results kept for each model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codegemm_kernels import BadInput


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task: {task: {metric: value}}.

    `tasks` are names known to lm-eval, or task configurations as dictionaries; `limit` is the number of examples of
    each. Raises BadInput for a name that lm-eval does not know.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(named))
    unknown = sorted(set(named) - set(manager.all_tasks))
    if unknown or not tasks:
        raise BadInput(f"lm-eval knows no task {', '.join(unknown) or 'without a name'}: see `lm-eval ls tasks`")
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        softmax_dtype="float32",
    )
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return {task: dict(metrics) for task, metrics in results["results"].items()}


def store_results(path: Path, model: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Merge `results` into the JSON file `path`, {model: {task: {metric: value}}}; other models and tasks stay.

    The file is replaced in one step. Raises BadInput when it is there and is no JSON object.
    """
    stored: dict[str, Any] = {}
    if path.exists():
        try:
            stored = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInput(f"{path} is not JSON ({error}): name another results file") from error
        if not isinstance(stored, dict) or not isinstance(stored.get(model, {}), dict):
            raise BadInput(f"{path} holds no results by model: name another results file")
    stored[model] = {**stored.get(model, {}), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text(json.dumps(stored, indent=2, sort_keys=True, default=str) + "\n")
    fresh.replace(path)
