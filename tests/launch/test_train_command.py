"""`shardemb train` as a user runs it: from a config and a data set to a run directory."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torchrec import EmbeddingBagConfig

from planner import Plan
from shardemb.config import load_config
from shardemb.sharding.initialize import from_seed
from tests.launch.tiny_run import ROWS, make_data, python, shardemb, tiny_config, write_config

RESULT_KEYS = {
    "embeddings",
    "steps",
    "samples",
    "samples_per_second",
    "data_wait_fraction",
    "train_loss",
    "dense_precision",
    "world_size",
    "plan_fingerprint",
    "checkpoint",
    "eval",
    "seconds",
    "restarts",
    "straggler",
}
EVAL_KEYS = {"auc", "logloss", "normalized_entropy", "samples"}
FILES = {
    "logs",
    *("config.yaml", "plan.json", "metrics.jsonl", "tensorboard", "checkpoints", "result.json"),
}


# Like a library's thread that outlives Python, but every time.
ABORT_AT_EXIT = """
import atexit, os
if "RANK" in os.environ:
    atexit.register(os.abort)
"""


class Runs:
    """Two runs of one config into one output, the second with --json."""

    def __init__(self, folder: Path) -> None:
        self.config = write_config(
            folder / "run.yaml", tiny_config(make_data(folder / "data"), folder / "run")
        )
        self.plain = shardemb("train", self.config)
        (folder / "sitecustomize.py").write_text(ABORT_AT_EXIT)
        self.as_json = shardemb("train", self.config, "--json", PYTHONPATH=str(folder))
        self.directory, self.earlier = folder / "run", folder / "run.1"

    @property
    def result(self) -> dict[str, Any]:
        return read(self.directory)


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how fast the machine was."""
    others = {"samples_per_second", "data_wait_fraction", "embeddings", "seconds", "straggler"}
    return {key: result[key] for key in result.keys() - others - {"checkpoint"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("train"))
    for process in (made.plain, made.as_json):
        assert process.returncode == 0, process.stderr
    return made


def test_the_result_has_exactly_the_promised_keys(runs: Runs) -> None:
    """result.json is a contract with scripts; its numbers fit the data set and each other."""
    result = runs.result
    assert result.keys() == RESULT_KEYS
    assert result["eval"].keys() == EVAL_KEYS
    assert (result["samples"], result["eval"]["samples"], result["world_size"]) == (2000, 500, 2)
    assert result["steps"] == 16  # 1000 rows a rank, 64 a step
    assert result["samples_per_second"] > 0
    assert 0 <= result["data_wait_fraction"] <= 1
    assert 0 < result["train_loss"] < 1


def test_the_run_directory_holds_what_it_promises(runs: Runs) -> None:
    """The files, complete; no partial ones."""
    assert {path.name for path in runs.directory.iterdir()} == FILES
    (events,) = (runs.directory / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.") and events.stat().st_size > 500


def test_every_line_of_the_metrics_parses(runs: Runs) -> None:
    """metrics.jsonl: the first step, each `log_every` and the last; then the evaluation."""
    *train, evaluation = map(json.loads, (runs.directory / "metrics.jsonl").open())
    assert [line["step"] for line in train] == [1, 4, 8, 12, 16]
    assert all(line["kind"] == "train" for line in train)
    assert train[-1]["train_loss"] == runs.result["train_loss"]
    assert evaluation["kind"] == "eval"
    assert {key: evaluation[key] for key in EVAL_KEYS} == runs.result["eval"]


def test_the_stored_config_is_the_one_that_ran(runs: Runs) -> None:
    """config.yaml, all defaults written out, gives the same run again."""
    assert load_config(runs.directory / "config.yaml") == load_config(runs.config)


def test_the_stored_plan_is_the_one_that_ran(runs: Runs) -> None:
    """plan.json loads, its fingerprint is the result's, and its shards are the config's."""
    plan = Plan.load(runs.directory / "plan.json")
    assert plan.fingerprint == runs.result["plan_fingerprint"]
    found = {name: table.sharding_type for name, table in plan.tables.items()}
    assert found == {
        "C1": "table_wise",
        "C2": "row_wise",
        "C3": "column_wise",
        "C4": "data_parallel",
        "C5": "table_wise",
        "C6": "table_wise",
    }


def test_json_is_one_object_on_stdout(runs: Runs) -> None:
    """With --json, stdout is result.json and nothing else; progress is on stderr."""
    assert json.loads(runs.as_json.stdout) == runs.result
    assert "step 16/16" in runs.as_json.stderr


def test_a_person_is_told_the_outcome_and_where_it_is(runs: Runs) -> None:
    """Without --json, stdout is a short summary; stderr has a line for each thing that takes its
    time, and no library's warning."""
    shown = runs.plain.stdout.splitlines()
    assert shown[0].startswith("trained 16 steps, ")
    assert re.fullmatch(
        r"test AUC 0\.\d{4} \(best reachable 0\.\d{4}\), log loss 0\.\d{4}, "
        r"normalized entropy \d\.\d{4}",
        shown[2],
    )
    assert re.fullmatch(r"embeddings \d+(\.\d+)? ms a step", shown[1])
    assert re.match(r"\d+\.\d s in all: start \d+\.\d, ", shown[3])
    assert shown[4:] == [f"run directory: {runs.directory}"]
    noise = [line for line in runs.plain.stderr.splitlines() if not line.startswith("step ")]
    assert [line for line in noise if line] == [
        "starting 2 workers on this machine",
        f"reading the footers of {runs.config.parent / 'data'}",
        "reading the first batches",
        "building the model",
        "sharding 6 tables",
        "training on 2 x cpu",
        "evaluating on the test split",
    ]


def test_a_finished_run_is_not_spoiled_by_its_libraries_teardown(runs: Runs) -> None:
    """A worker whose work is done ends well, whatever would go wrong while Python shuts down."""
    assert runs.as_json.returncode == 0


def test_an_earlier_run_is_kept_beside_the_new_one(runs: Runs) -> None:
    """A run never writes over another: the first is renamed, whole."""
    assert {path.name for path in runs.earlier.iterdir()} == FILES
    assert read(runs.earlier)["samples_per_second"] != runs.result["samples_per_second"]


def test_the_same_seed_gives_the_same_numbers(runs: Runs) -> None:
    """Two runs of one config on two ranks agree to the last bit."""
    assert numbers(read(runs.earlier)) == numbers(runs.result)


def test_torchrun_gives_the_same_numbers(runs: Runs, tmp_path: Path) -> None:
    """Whoever starts the workers, the run is the same; so it is from a plan made before."""
    plan = runs.directory / "plan.json"
    process = torchrun(runs.config, f"output={tmp_path / 'run'}", f"sharding.plan={plan}")
    assert process.returncode == 0, process.stderr
    assert numbers(read(tmp_path / "run")) == numbers(runs.result)


def test_torchrun_shows_a_users_mistake_as_such(runs: Runs, tmp_path: Path) -> None:
    """Without our launcher, the message is on stderr, before what torchrun adds."""
    process = torchrun(runs.config, f"output={tmp_path / 'run'}", f"data.dir={tmp_path}/nowhere")
    assert process.returncode != 0
    assert f"there is no folder {tmp_path}/nowhere/train" in process.stderr
    ours = process.stderr.partition("ChildFailedError")[0].partition("torch.distributed.elastic")[0]
    assert "shardemb/train.py" not in ours
    assert not (tmp_path / "run").exists()


def test_each_table_as_its_config_says(runs: Runs, tmp_path: Path) -> None:
    """A run with an optimizer for a table, frozen ones, clipping, bf16 and fp16 communication ends
    with other numbers, and writes down what it did. Of its tables, however sharded, those that are
    frozen have their first values at the end, and no other."""
    output = tmp_path / "run"
    process = shardemb(
        *("train", runs.config, f"output={output}", "tables.C1.optimizer={name: lamb, lr: 0.02}"),
        *("tables.C{2..4}.frozen=true", "tables.C5.frozen={until_step: 3}"),
        *("train.gradient_clipping.norm=0.1", "train.precision.dense=bf16"),
        "train.communication={forward: fp16, backward: fp16}",
    )
    assert process.returncode == 0, process.stderr
    result = read(output)
    assert 0 < result["train_loss"] < 1 and result["train_loss"] != runs.result["train_loss"]
    config = load_config(output / "config.yaml")
    assert (config.table_optimizer("C1").name, config.table_optimizer("C6").name) == (
        "lamb",
        "adagrad",
    )
    done = shardemb("checkpoint", "export", output, tmp_path / "tables", "--format", "parquet")
    assert done.returncode == 0, done.stderr
    for name, rows in ROWS.items():
        table = EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=8, feature_names=[name]
        )
        first_values = from_seed(table, 0, torch.device("cpu"))
        assert first_values is not None
        last = pq.read_table(tmp_path / "tables" / f"{name}.parquet")["embedding"].to_pylist()
        is_same = torch.equal(torch.tensor(last), first_values(0, rows))
        assert is_same == (name in ("C2", "C3", "C4"))


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return python(*launcher, "-m", "shardemb.train", *arguments)
