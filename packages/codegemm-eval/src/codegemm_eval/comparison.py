"""Measure any number of models, keep every result the moment it is there, and measure nothing twice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from codegemm_eval.measures import Measure, Subject, suite_means
from codegemm_eval.results import Cell, ResultFile, describe_run
from codegemm_eval.score import FolderScore, score_folder


def fill_cells(
    subject: Subject, measures: Sequence[Measure], results: ResultFile, *, redo: bool = False
) -> list[tuple[Measure, Cell]]:
    """The result of every measure of `subject`, taken from `results` or measured and added to it.

    When a measure fails or is interrupted, what was finished is in the file; `redo` measures again what is there.
    """
    cells = []
    for measure in measures:
        setting = measure.setting(subject)
        known = None if redo else results.find(subject.content, measure.task, setting)
        if known is None:
            print(f"{subject.given}: {measure.task}", file=sys.stderr)
            known = _measure(subject, measure, setting, results)
        cells.append((measure, known))
    subject.release()
    return cells


def _measure(subject: Subject, measure: Measure, setting: dict[str, Any], results: ResultFile) -> Cell:
    try:
        result = measure.run(subject)
    except (Exception, KeyboardInterrupt):  # whatever it is goes on, after a word about what it does not cost
        if results.cells:
            print(f"what was finished is kept in {results.path}", file=sys.stderr)
        raise
    cell = Cell(subject.content, measure.task, setting, result, describe_run(subject.name, subject.model.device))
    results.add(cell)
    return cell


def score(subject: Subject, cells: Sequence[tuple[Measure, Cell]]) -> FolderScore:
    """The row of a table: size, and the columns of all cells."""
    columns: dict[str, float] = {}
    for measure, cell in cells:
        columns |= measure.columns(cell.result)
    return score_folder(subject.folder, columns | suite_means(columns), name=subject.name)


def as_report(scores: Sequence[FolderScore], cells: Sequence[Cell]) -> dict[str, Any]:
    """All of a comparison as JSON: the table, and behind it every cell with its setting and where it was measured."""
    return {"models": [asdict(each) for each in scores], "cells": [vars(cell) for cell in cells]}
