"""The roofline of bench_kernels, which CI cannot run for a GPU: drawn from measurements that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["kernels-h200", "kernels-h200-grouped"])
def test_no_product_is_above_the_roof(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from bench import kernel_chart
    from matplotlib import pyplot

    measured = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    kernel_chart.draw(measured["rows"], measured["read_rate"], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    *points, slope, top = (line.get_xydata() for line in pyplot.gcf().axes[0].lines if len(line.get_xdata()))
    assert len(points) == len(measured["rows"]) + sum(row["dense_us"] is not None for row in measured["rows"])
    rate = slope[0][1] / slope[0][0]
    assert rate == pytest.approx(measured["read_rate"])
    assert all(y <= min(1.05 * rate * x, top[0][1]) for ((x, y),) in (point.tolist() for point in points))
    pyplot.close("all")
