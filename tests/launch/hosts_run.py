"""A run for tests of many hosts: deterministic, with checkpoints, and a rank that can be told to
send itself a signal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.launch.tiny_run import tiny_config, write_config

# Rank 1 sends itself a signal in the seventh step, as often as it is told to; each step takes at
# least `seconds`.
MORTAL = """
import os, signal, time
from pathlib import Path

from shardemb.models.dlrm import DLRM

class Mortal(DLRM):
    def __init__(self, embeddings, num_dense, mark, what, times=1, seconds=0):
        super().__init__(embeddings, num_dense, dense_layers=[8], over_layers=[8])
        self.mark, self.step, self.times = Path(mark), 0, times
        self.signal, self.seconds = getattr(signal, what), seconds

    def forward(self, batch):
        time.sleep(self.seconds)
        self.step += self.training
        deaths = len(list(self.mark.parent.glob(self.mark.name + "*")))
        if os.environ["RANK"] == "1" and self.step == (1 if deaths else 7) and deaths < self.times:
            Path(f"{self.mark}{deaths}").touch()
            os.kill(os.getpid(), self.signal)
        return super().forward(batch)
"""


class Run:
    """16 steps of four ranks, with a checkpoint after every second."""

    def __init__(self, folder: Path, data: Path) -> None:
        config = tiny_config(data, folder / "run")
        config["train"] |= {"epochs": 2, "deterministic": True, "log_every": 1}
        config["checkpoint"] = {"every_steps": 2, "asynchronous": False}
        config["sharding"]["tables"] |= {"C5": "table_row_wise", "C6": "grid_shard"}
        self.folder, self.directory = folder, folder / "run"
        self.config = write_config(folder / "run.yaml", config)
        (folder / "mortal.py").write_text(MORTAL)

    def metrics(self) -> list[dict[str, Any]]:
        """None before training."""
        path = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def losses(self) -> dict[int, float]:
        return {m["step"]: m["train_loss"] for m in self.metrics() if m["kind"] == "train"}

    def bytes_of_newest(self) -> dict[str, bytes]:
        listed = json.loads((self.directory / "checkpoints" / "checkpoints.json").read_text())
        folder = self.directory / "checkpoints" / listed["checkpoints"][-1]
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def mortal(self, what: str, times: int = 1, seconds: float = 0) -> list[str]:
        """Overrides by which rank 1 sends itself a signal, and steps take so long."""
        values = {"mark": f"{self.folder}/died", "what": what, "times": times, "seconds": seconds}
        args = json.dumps(values)
        return ["model.name=mortal:Mortal", f"model.args={args}"]
