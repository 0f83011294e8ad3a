"""What runs on CPU runs on CUDA devices, with the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from planner import ShardingRule, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.config import RunConfig
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from tests.distributed.pool import WorkerPool
from tests.distributed.test_mixed_optimizers import CASES, check_case
from tests.distributed.test_sharded_equals_unsharded import check, specs
from tests.gpu.conftest import Place
from tests.launch.tiny_run import make_data, shardemb, tiny_config, write_config

OPTIMIZERS = [
    *(("sgd", "sgd"), ("rowwise_adagrad", "adam"), ("adam", "sgd")),
    *(("partial_rowwise_adam", "sgd"), ("lamb", "sgd"), ("partial_rowwise_lamb", "sgd")),
]


@pytest.mark.parametrize(("tables", "dense"), OPTIMIZERS)
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_every_type_equals_unsharded_training(
    pool: WorkerPool, sharding_type: str, tables: str, dense: str
) -> None:
    """After five steps tables, optimizer states and dense weights are the reference's."""
    topology = Topology(world_size=pool.world_size, local_world_size=pool.world_size)
    plan = plan_by_rule(specs(tables), topology, ShardingRule(sharding_type=sharding_type))
    check(pool, plan, tables, dense, weighted=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharding_type", ["row_wise", "data_parallel"])
def test_tables_trained_in_different_ways(pool: WorkerPool, sharding_type: str, case: str) -> None:
    """Optimizers, decay, limits and frozen steps of each table, and clipping, are the reference's
    with kernels that know them as with those whose updates are taken over."""
    check_case(pool, sharding_type, case)


def test_a_run_comes_to_its_end(place: Place, tmp_path: Path) -> None:
    """`shardemb train` uses the devices it is told to, and ends with a result of numbers."""
    config = tiny_config(make_data(tmp_path / "data"), tmp_path / "run")
    config["launch"] = {"nproc_per_node": place.world_size, "device": place.device}
    process = shardemb("train", write_config(tmp_path / "run.yaml", config))
    assert process.returncode == 0, process.stderr
    assert f"training on {place.world_size} x {place.device}" in process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["world_size"], result["samples"]) == (place.world_size, 2000)
    assert math.isfinite(result["train_loss"])
    assert result["eval"]["samples"] == 500
    assert all(math.isfinite(result["eval"][name]) for name in ("auc", "logloss"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_goes_to_a_gpu_by_one_copy(tmp_path: Path) -> None:
    """From page-locked memory, with the values that a CPU is given."""
    data = make_data(tmp_path / "data")
    schema = BatchSchema.from_config(RunConfig.model_validate(tiny_config(data, tmp_path)))
    reader = ParquetReader(data / "train", schema, batch_size=64, rank=0, world_size=1)
    batches = reader.epoch()
    host = next(batches)
    batches.close()
    assert host.labels.is_pinned()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        device = host.to(torch.device("cuda"), non_blocking=True)
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "HtoD" in event.name]
    assert len(copies) == 1
    assert torch.equal(device.dense.cpu(), host.dense)
    assert torch.equal(device.sparse.values().cpu(), host.sparse.values())
    assert torch.equal(device.sparse.lengths().cpu(), host.sparse.lengths())
