from __future__ import annotations

import matplotlib.image

from codegemm_eval.report import markdown_table, save_chart, terminal_table
from codegemm_eval.score import FolderScore

SCORES = [
    FolderScore("pylm", "dense", 16.0, 8_396_800, 4.891),
    FolderScore("pylm-m1v4g128", "m1v4g128", 2.13, 2_900_000, 6.5),
]


def test_tables():
    assert terminal_table(SCORES).splitlines() == [
        "model          scheme    bits/weight  size (MB)  perplexity",
        "-------------  --------  -----------  ---------  ----------",
        "pylm           dense           16.00       8.40       4.891",
        "pylm-m1v4g128  m1v4g128         2.13       2.90       6.500",
    ]
    assert markdown_table(SCORES).splitlines() == [
        "| model | scheme | bits/weight | size (MB) | perplexity |",
        "|---|---|---:|---:|---:|",
        "| pylm | dense | 16.00 | 8.40 | 4.891 |",
        "| pylm-m1v4g128 | m1v4g128 | 2.13 | 2.90 | 6.500 |",
    ]


def test_chart_is_a_png_that_is_not_empty(tmp_path):
    save_chart(SCORES, tmp_path / "new" / "chart.png", "Size and perplexity")
    pixels = matplotlib.image.imread(tmp_path / "new" / "chart.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 800
    assert len({tuple(pixel) for row in pixels[::20, ::20] for pixel in row.round(2)}) > 3
