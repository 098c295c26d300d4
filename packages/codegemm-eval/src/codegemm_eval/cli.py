"""The command `codegemm-eval`: ppl, tasks, compare."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from codegemm_eval.harness import TaskOptions
from codegemm_eval.speed import SpeedSetting
from codegemm_eval.windows import Protocol
from codegemm_kernels.errors import BadInput, run_command

if TYPE_CHECKING:
    from codegemm_eval.measures import Measure, Subject

CHART_SUFFIXES = (".png", ".svg", ".pdf")
Flat = tyro.conf.arg(name="")
"""The options of a nested dataclass without a prefix."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint folder is loaded and run."""

    device: str | None = None
    """cpu, cuda, cuda:N or auto (spread over all there is); the first GPU if there is one, or else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is the dtype of the checkpoint."""
    batch_size: int | None = None
    """Windows or requests in one forward pass; what fits if not given. When memory ends, it is halved."""
    debug: bool = False
    """Show the traceback of a failure."""

    def subject(self, folder: str) -> Subject:
        """`folder`, to be loaded like this. Raises BadInput when there is none."""
        from codegemm_eval.measures import Subject

        if self.batch_size is not None and self.batch_size < 1:
            raise BadInput(f"a batch of {self.batch_size} is none: use 1 or more")
        return Subject(folder, self.device, self.dtype, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Ppl(LoadOptions):
    """Perplexity of a checkpoint, dense or quantised, on a text."""

    folder: tyro.conf.Positional[str]
    """Checkpoint folder or hub name."""
    data: str
    """A .txt, .jsonl or .parquet file, or wikitext2, c4, c4-tokens, c4-documents, ptb or ptb-new (downloaded)."""
    teacher: str | None = None
    """Dense model to compare the predictions with: adds KL divergence and top-1 agreement."""
    protocol: Annotated[Protocol, Flat] = field(default_factory=Protocol)

    def run(self) -> dict[str, Any]:
        """The fields of Perplexity, and what was measured on."""
        from codegemm_eval.measures import TextMeasure
        from codegemm_eval.text import load_text

        teacher = None if self.teacher is None else self.subject(self.teacher)
        result = TextMeasure(load_text(self.data), self.protocol, teacher).run(self.subject(self.folder))
        print(
            f"{result['windows']} of {result['windows_in_text']} windows ({result['windows_chosen']}) of "
            f"{result['window']} tokens, stride {result['stride']}; BOS: {result['bos']}",
            file=sys.stderr,
        )
        return result


@dataclass(frozen=True, kw_only=True)
class Kept(LoadOptions):
    """Where results are kept."""

    results: Path = Path("results.jsonl")
    """File that results are added to, and looked up in before anything is measured."""
    redo: bool = False
    """Measure again what is in the results file."""


@dataclass(frozen=True, kw_only=True)
class Tasks(Kept):
    """Run lm-eval tasks on a checkpoint, dense or quantised."""

    folder: tyro.conf.Positional[str]
    """Checkpoint folder or hub name."""
    chosen: Annotated[TaskOptions, Flat] = field(default_factory=TaskOptions)

    def run(self) -> dict[str, Any]:
        """{"model", "tasks": {task: {"metric", "value", "metrics"}}, "results"}."""
        from codegemm_eval.comparison import fill_cells
        from codegemm_eval.results import ResultFile

        measures = task_measures(self.chosen)
        if not measures:
            raise BadInput("no task: give --tasks or --suite")
        cells = fill_cells(self.subject(self.folder), measures, ResultFile(self.results), redo=self.redo)
        print(f"results: {self.results}", file=sys.stderr)
        tasks = {cell.task: cell.result for _, cell in cells}
        return {"model": self.folder, "tasks": tasks, "results": str(self.results)}


@dataclass(frozen=True, kw_only=True)
class Compare(Kept):
    """One table and chart of any number of models: size, perplexity, divergence, tasks, speed."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Checkpoint folders or hub names, dense or quantised."""
    data: tuple[str, ...] = ()
    """Texts for perplexity: files or names, as in `ppl`."""
    teacher: str | None = None
    """Dense model to compare predictions with: adds KL divergence and top-1 agreement."""
    speed: bool = False
    """Measure tokens a second too."""
    chart: Path = Path("comparison.png")
    """The chart to write; the table goes beside it as .md, everything as .json."""
    protocol: Annotated[Protocol, Flat] = field(default_factory=Protocol)
    chosen: Annotated[TaskOptions, Flat] = field(default_factory=TaskOptions)
    generation: Annotated[SpeedSetting, Flat] = field(default_factory=SpeedSetting)

    def run(self) -> dict[str, Any]:
        """{"models": [one row each], "chart", "table", "json", "results"}."""
        from codegemm_eval.comparison import as_report, fill_cells, score
        from codegemm_eval.report import markdown_table, save_chart, terminal_table
        from codegemm_eval.results import ResultFile

        if not self.folders:
            raise BadInput("nothing to compare: give one or more checkpoint folders")
        if self.chart.suffix not in CHART_SUFFIXES:
            raise BadInput(f"the chart {self.chart} must end in one of {', '.join(CHART_SUFFIXES)}")
        subjects = [self.subject(folder) for folder in self.folders]
        results = ResultFile(self.results)
        measures = self.measures()
        scores, cells = [], []
        for subject in subjects:
            filled = fill_cells(subject, measures, results, redo=self.redo)
            scores.append(score(subject, filled))
            cells += [cell for _, cell in filled]
        written = {"table": self.chart.with_suffix(".md"), "json": self.chart.with_suffix(".json")}
        save_chart(scores, self.chart, "Quality and speed against size")
        replace(written["table"], markdown_table(scores) + "\n")
        replace(written["json"], json.dumps(as_report(scores, cells), indent=2) + "\n")
        files = {"chart": self.chart, **written, "results": self.results}
        print(terminal_table(scores), *(f"{kind}: {file}" for kind, file in files.items()), sep="\n", file=sys.stderr)
        return {"models": [asdict(each) for each in scores], **{kind: str(file) for kind, file in files.items()}}

    def measures(self) -> list[Measure]:
        """Everything asked for, looked at before the first model is loaded."""
        from codegemm_eval.measures import SpeedMeasure, TextMeasure
        from codegemm_eval.text import load_text

        texts = [load_text(source) for source in self.data]
        names = [text.name for text in texts]
        if len(set(names)) < len(names):
            raise BadInput(f"two texts have the same name ({', '.join(names)}): rename a file")
        teacher = None if self.teacher is None else self.subject(self.teacher)
        found: list[Measure] = [TextMeasure(text, self.protocol, teacher) for text in texts]
        found += task_measures(self.chosen)
        if self.speed:
            found.append(SpeedMeasure(self.generation))
        if not found:
            raise BadInput("nothing to measure: give --data, --tasks, --suite or --speed")
        return found


def task_measures(options: TaskOptions) -> list[Measure]:
    """What `options` ask for; lm-eval, which takes seconds to import, only if there is something."""
    if not options.tasks and not options.suite:
        return []
    from codegemm_eval.harness import Harness
    from codegemm_eval.measures import TaskMeasure

    harness = Harness(options)
    return [TaskMeasure(harness, task) for task in harness.tasks]


def replace(file: Path, text: str) -> None:
    """Write `file` whole or not at all."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    commands: dict[str, Callable[..., Any]] = {"ppl": Ppl, "tasks": Tasks, "compare": Compare}

    def parse_and_run() -> dict[str, Any]:
        # Some values are checked while they are parsed.
        command: Ppl | Tasks | Compare = tyro.extras.subcommand_cli_from_dict(
            commands, prog="codegemm-eval", args=arguments
        )
        return command.run()

    debug = "--debug" in (sys.argv if arguments is None else arguments)
    sys.exit(run_command(parse_and_run, debug=debug))
