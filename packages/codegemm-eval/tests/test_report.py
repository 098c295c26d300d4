from __future__ import annotations

import matplotlib.image
import pytest

from codegemm_eval.report import markdown_table, save_chart, terminal_table
from codegemm_eval.score import FolderScore

SCORES = [
    FolderScore("pylm", "dense", 16.0, 8_396_800, {"perplexity": 4.891, "tokens/s": 150.04}),
    FolderScore("pylm-m1v4g128", "m1v4g128", 2.13, 2_900_000, {"perplexity": 6.5, "arc_easy (acc)": 0.25}),
]


def test_tables():
    assert terminal_table(SCORES).splitlines() == [
        "model          scheme    bits/weight  size (MB)  perplexity  tokens/s  arc_easy (acc)",
        "-------------  --------  -----------  ---------  ----------  --------  --------------",
        "pylm           dense           16.00       8.40       4.891     150.0               -",
        "pylm-m1v4g128  m1v4g128         2.13       2.90       6.500         -          0.2500",
    ]
    assert markdown_table(SCORES).splitlines() == [
        "| model | scheme | bits/weight | size (MB) | perplexity | tokens/s | arc_easy (acc) |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| pylm | dense | 16.00 | 8.40 | 4.891 | 150.0 | - |",
        "| pylm-m1v4g128 | m1v4g128 | 2.13 | 2.90 | 6.500 | - | 0.2500 |",
    ]


@pytest.mark.parametrize("panels", [1, 4, 9])
def test_chart_has_a_point_for_every_model_in_every_panel(tmp_path, panels):
    measured = {f"task{i} (acc)": 0.1 * i for i in range(panels)}
    scores = [FolderScore(f"m{i}", "m1v4g128", 2.1, 10**6 * (i + 1), measured) for i in range(2)]
    save_chart(scores, tmp_path / "new" / "chart.png", "Size and quality")
    pixels = matplotlib.image.imread(tmp_path / "new" / "chart.png")[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 700
    for colour in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055)):  # the first two of tab10
        points = (abs(pixels - colour).max(-1) < 0.02).sum()
        # a marker has some 100 pixels at this resolution, and the legend has one too
        assert points > 60 * (min(panels, 6) + 1), points
