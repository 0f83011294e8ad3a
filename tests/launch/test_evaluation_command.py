"""A run with several tasks that is evaluated as it trains and stops early, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launch.tiny_run import make_data, shardemb, tiny_config, write_config

EVERY, PATIENCE = 4, 2
KEYS = {
    *("click/auc", "click/logloss", "click/gauc", "click/ndcg@3", "click/calibration"),
    *("order/gauc", "order/auc", "order/ndcg@3"),
}


class EarlyRun:
    def __init__(self, folder: Path) -> None:
        data = make_data(folder / "data")
        shutil.copytree(data / "test", data / "valid")
        config = tiny_config(data, folder / "run")
        config["data"]["group"] = "C1"
        config["model"]["args"] |= {"dropout": 0.1, "norm": "batch"}
        config["train"] |= {
            "epochs": 4,
            "table_optimizer": {"name": "adagrad", "lr": 0.3},
            "dense_optimizer": {"name": "adam", "lr": 0.02},
            "tasks": {
                "click": {"labels": "label"},
                "order": {"loss": "bpr", "labels": "label", "weight": 0.3},
            },
        }
        config["evaluation"] = {
            "metrics": ["auc", "logloss", "gauc", "ndcg@3", "calibration"],
            "every_steps": EVERY,
            "split": "valid",
            "metric": "click/logloss",
            "early_stopping": {"patience": PATIENCE},
        }
        self.config = write_config(folder / "run.yaml", config)
        self.directory = folder / "run"
        self.process = shardemb("train", self.config)

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "result.json").read_text())

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.directory / "metrics.jsonl").open())
        return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EarlyRun:
    made = EarlyRun(tmp_path_factory.mktemp("early"))
    assert made.process.returncode == 0, made.process.stderr
    return made


def test_it_stops_and_has_the_best_step(run: EarlyRun) -> None:
    """metrics.jsonl has each evaluation with its split; result.json the best step, whose weights
    are evaluated on the test split: here a copy of the other, so with the same numbers."""
    *validations, last = run.records("eval")
    assert {line["split"] for line in validations} == {"valid"} and last["split"] == "test"
    values = {line["step"]: line["click/logloss"] for line in validations}
    best = min(values, key=lambda step: values[step])
    result = run.result
    assert list(values) == list(range(EVERY, result["steps"] + 1, EVERY))
    assert result["steps"] == best + PATIENCE * EVERY < 64
    assert result["best"] == {
        "step": best, "metric": "click/logloss", "value": values[best], "restored": True,
    }  # fmt: skip
    assert result["checkpoint"].endswith(f"step-{best:08d}")
    assert result["eval"].keys() == KEYS | {"samples"}
    at_best = next(line for line in validations if line["step"] == best)
    for key in KEYS:
        assert result["eval"][key] == pytest.approx(at_best[key], rel=1e-6), key


def test_a_person_is_told(run: EarlyRun) -> None:
    """Each evaluation as it comes, which was the best, and what it scores."""
    best = run.result["best"]
    assert f"step {best['step']}: valid click/AUC 0." in run.process.stderr
    assert "the best so far" in run.process.stderr
    assert f"best step {best['step']}: valid click/log loss" in run.process.stdout
    assert "test click/AUC 0." in run.process.stdout


def test_the_best_checkpoint_is_evaluated_by_name(run: EarlyRun) -> None:
    """`shardemb eval --checkpoint best` finds what the run found."""
    process = shardemb("eval", run.config, "--checkpoint", "best", "--json")
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found == {"step": run.result["best"]["step"], "eval": run.result["eval"]}
