"""The chart of bench_decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of each backend, scheme and context over the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if "batch" in row:
            line = lines.setdefault(f"{row['backend']} {row['scheme']}, context {row['context']}", [])
            line.append((row["batch"], row["tokens_per_second"], row["tokens_per_second_std"]))
    for label, line in lines.items():
        axes.errorbar(*zip(*sorted(line), strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sequences at a time")
    axes.set_ylabel("tokens a second")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
