"""tools/two_gpus.py on a CPU: two processes with half of every layer against one; the GPUs are tried where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_halves_of_every_layer(road: dict[str, Any], root: Path) -> None:
    command = [sys.executable, str(root / "tools" / "two_gpus.py"), "--models", road["checkpoint"], "--device", "cpu"]
    options = ["--dtypes", "float32", "--new-tokens", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["way"][-9:] for row in rows] == ["process 0", "process 1"]
    assert all(row["same_tokens"] and row["logit_error"] < 1e-5 for row in rows)
