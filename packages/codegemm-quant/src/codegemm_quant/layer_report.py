"""What a run did to each layer: a JSON file and a chart beside the checkpoint's own files."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

from codegemm_kernels.model_card import REPORT_FILE

CHART = "quantization_errors.png"


def write_report(
    folder: Path, summary: dict[str, Any], blocks: list[dict[str, Any]], divergence: dict[str, float] | None
) -> None:
    """Write both files into a checkpoint folder.

    blocks: for each block its name, its relative error and, by layer, scheme, bits and relative errors.
    """
    content = summary | {"divergence": divergence, "per_block": blocks}
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n")
    _draw(blocks, folder / CHART)


def _draw(blocks: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(layer for block in blocks for layer in block["layers"]))
    if len(names) <= 16:  # one line for each kind of layer; a mixture of experts has too many
        for name in names:
            axes.plot(
                [block["layers"].get(name, {}).get("relative_error", nan) for block in blocks], marker=".", label=name
            )
    else:
        worst = [max((layer["relative_error"] for layer in block["layers"].values()), default=nan) for block in blocks]
        axes.plot(worst, marker=".", label="largest of the block's layers")
    axes.plot([block["error"] for block in blocks], color="black", linewidth=2, label="the whole block")
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared error of outputs")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
