"""The charts of bench_kernels: a roofline, and for a CPU the time over that of a plain read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Achieved bandwidth of codes and scales over bytes, one line a scheme and batch, with the memory's ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    batches, schemes = sorted({row["batch"] for row in rows}), sorted({row["scheme"] for row in rows})
    colours = dict(
        zip(batches, pyplot.get_cmap("viridis")([i / len(batches) for i in range(len(batches))]), strict=True)
    )
    markers = dict(zip(schemes, "osv^Dx+*" * len(schemes), strict=False))
    for scheme, batch in sorted({(row["scheme"], row["batch"]) for row in rows}):
        line = sorted(
            (row["floor_us"], row["floor_us"] / row["us"])
            for row in rows
            if (row["scheme"], row["batch"]) == (scheme, batch)
        )
        style = {"color": colours[batch], "marker": markers[scheme], "label": f"{scheme}, batch {batch}"}
        axes.plot([x for x, _ in line], [y for _, y in line], linewidth=1, **style)
    streams = sorted({(row["floor_us"], row["floor_us"] / row["stream_us"]) for row in rows if row["stream_us"]})
    if streams:
        axes.plot([x for x, _ in streams], [y for _, y in streams], "k--", label="reading the codes only")
    axes.axhline(1, color="grey")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of codes and scales, in microseconds at read speed")
    axes.set_ylabel("share of read speed reached")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of one row of x over that of reading the codes and scales, by shape, scheme and threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in first))
    kinds = list(dict.fromkeys((row["scheme"], row["threads"]) for row in first))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(kinds)
    for at, (scheme, threads) in enumerate(kinds):
        ratios = {
            row["shape"]: row["us"] / row["stream_us"]
            for row in first
            if (row["scheme"], row["threads"]) == (scheme, threads)
        }
        places = [i + (at - (len(kinds) - 1) / 2) * width for i in range(len(shapes))]
        axes.bar(places, [ratios[shape] for shape in shapes], width, label=f"{scheme}, threads: {threads}")
    axes.axhline(1, color="grey")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("time / time of a plain read")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
