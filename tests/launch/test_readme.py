"""The README's Python example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_python_example(tmp_path: Path) -> None:
    """Started as its first line says, it trains and prints its metrics."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) < 30
    (tmp_path / "clicks.py").write_text(code[1])
    config = ROOT / "configs" / "demo.yaml"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["-m", "launch.cli", "data", "synth", str(config), "--train-rows", "40000",
         "--test-rows", "4000"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "clicks.py"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    auc = re.search(r"Evaluation\(auc=(0\.\d+)", done.stdout)
    assert auc is not None
    assert 0.65 < float(auc[1]) < 0.9
