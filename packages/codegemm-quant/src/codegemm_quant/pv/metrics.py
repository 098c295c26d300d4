"""What a run has measured: a line of JSON each time, TensorBoard events, and a chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Records of a run in a folder: metrics.jsonl, TensorBoard's event file, metrics.png.

    A record is {"step": n, ...}; those of evaluations have "perplexity". Opening a folder for a run that continues at
    `step` drops later records: they are measured again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "metrics.jsonl"
        # A kill or a full disk may have left half a line, and the next one may come before all is written again.
        lines = path.read_text().split("\n")[:-1] if path.exists() and step else []
        self.records: list[dict[str, Any]] = [record for line in lines if (record := json.loads(line))["step"] <= step]
        rewritten = folder / ".metrics.jsonl.partial"
        rewritten.write_text("".join(f"{json.dumps(record)}\n" for record in self.records))
        rewritten.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, record: dict[str, Any]) -> None:
        """Write one record down at once."""
        self.records.append(record)
        print(json.dumps(record), file=self._file, flush=True)
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Draw the chart and finish the files."""
        self._file.close()
        self._board.close()
        self._draw()

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, names in zip(panels, (("loss", "divergence"), ("perplexity",)), strict=True):
            for name in names:
                points = [(record["step"], record[name]) for record in self.records if name in record]
                if points:
                    marker = "." if name != "loss" else None
                    axes.plot(*zip(*points, strict=True), label=name, marker=marker, linewidth=1)
            axes.set_xlabel("step")
            axes.legend()
            axes.grid(alpha=0.3)
        figure.savefig(self.folder / "metrics.png", dpi=120)
