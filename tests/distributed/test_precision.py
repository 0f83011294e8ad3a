"""What lower precision does to training, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from planner import Plan, RequestError, ShardingRule, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb import dense_precision
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.data.synthetic import SyntheticFeature, synthesize
from shardemb.dense_precision import has_bf16
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.precision_config import CommunicationConfig, PrecisionConfig
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.sharding.tables import tables_from_module
from shardemb.trainer import Trainer
from tests.distributed import sharded
from tests.distributed.pool import WorkerPool
from tests.distributed.reference import Reference
from tests.distributed.test_sharded_equals_unsharded import (
    BATCH_SIZE,
    compare,
    draw_steps,
    specs,
)

FP16 = CommunicationConfig(forward="fp16", backward="fp16")
SENT = [FP16, CommunicationConfig(forward="fp16"), CommunicationConfig(backward="fp16")]

two_ranks = pytest.mark.shapes((2, 2))
two_hosts = pytest.mark.shapes((4, 2))


def plan_of(pool: WorkerPool, sharding_type: str) -> Plan:
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    return plan_by_rule(specs("sgd"), topology, ShardingRule(sharding_type=sharding_type))


@two_hosts
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_sent_in_fp16(pool: WorkerPool, sharding_type: str) -> None:
    """Every type trains as the reference does, to what fp16 holds; each of the two ways makes a
    difference where embeddings are sent at all."""
    plan, steps = plan_of(pool, sharding_type), draw_steps(pool.world_size)
    expected = Reference("sgd", "sgd", True).train(steps)
    held = {}
    for communication in (CommunicationConfig(), *SENT):
        own = sharded.Own(communication=communication)
        held[communication] = pool.run(
            sharded.train, plan, "sgd", "sgd", True, steps, BATCH_SIZE, pool.device, own
        )
        compare(held[communication], expected, plan, 2e-3, 2e-3)
    plain = held.pop(CommunicationConfig())
    for lossy in held.values():
        is_same = all(
            torch.equal(values, same)
            for before, after in zip(plain, lossy, strict=True)
            for name in before
            for (_, _, values), (_, _, same) in zip(before[name], after[name], strict=True)
        )
        assert is_same == (sharding_type == "data_parallel")


def refusal(plan: Plan) -> str:
    with pytest.raises(RequestError) as caught:
        shard_model(
            sharded.Model(weighted=False), plan, communication=CommunicationConfig(backward="bf16")
        )
    return str(caught.value)


@two_ranks
def test_bf16_is_not_sent_between_cpus(pool: WorkerPool) -> None:
    """TorchRec would send fp16 instead."""
    for message in pool.run(refusal, plan_of(pool, "row_wise")):
        assert message.startswith("train.communication.backward: ")
        assert "choose fp16 or fp32" in message


# --- What it costs

ROWS, TABLES = 12_000, {f"C{i}": 60 * i for i in range(1, 5)}


class Clicks(torch.nn.Module):
    """Two dense layers over the tables; remembers what its matrix products were computed in."""

    def __init__(self, dtype: DataType) -> None:
        super().__init__()
        torch.manual_seed(1)
        configs = [
            EmbeddingBagConfig(
                name=name, num_embeddings=n, embedding_dim=8, feature_names=[name], data_type=dtype
            )
            for name, n in TABLES.items()
        ]
        self.embeddings = EmbeddingBagCollection(configs, device="meta")
        self.hidden = torch.nn.Linear(8 * len(TABLES) + 2, 16)
        self.over = torch.nn.Linear(16, 1)
        self.dtypes: set[tuple[bool, torch.dtype]] = set()

    def forward(self, batch: Batch) -> torch.Tensor:
        pooled = self.embeddings(batch.sparse)
        values = torch.cat([batch.dense, *(pooled[name] for name in TABLES)], dim=1)
        logits: torch.Tensor = self.over(torch.relu(self.hidden(values)))
        self.dtypes.add((self.training, logits.dtype))
        return logits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clicks") / "data"
    synthesize(
        folder,
        features=[SyntheticFeature(name, rows) for name, rows in TABLES.items()],
        dense=["I1", "I2"],
        train_rows=ROWS,
        test_rows=4000,
    )
    return folder


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 dense": {"precision": PrecisionConfig(dense="bf16")},
    "fp16 communication": {"communication": FP16},
    "fp16 tables": {"dtype": DataType.FP16},
}


def auc_of(data: Path, switch: str) -> tuple[float, set[tuple[bool, torch.dtype]]]:
    options = dict(SWITCHES[switch])
    model = Clicks(options.pop("dtype", DataType.FP32))
    dtypes, precision = model.dtypes, options.pop("precision", None)
    tables = tables_from_module(model)
    plan = plan_by_rule(tables, current_topology(), ShardingRule(sharding_type="row_wise"))
    optimizer = TableOptimizerConfig(lr=0.1)
    trainer = Trainer(
        shard_model(model, plan, optimizer, **options),
        DenseOptimizerConfig(lr=0.005),
        precision=precision,
    )
    assert all(p.dtype == torch.float32 for p in trainer.model.module.hidden.parameters())
    schema = BatchSchema.for_tables(tables, dense=("I1", "I2"), dense_transform="log")
    trainer.train(ParquetReader(data / "train", schema, batch_size=64, shuffle=True), epochs=3)
    reader = ParquetReader(data / "test", schema, batch_size=64)
    return trainer.evaluate(reader.epoch()).metrics["auc"], dtypes


@two_ranks
def test_each_switch_costs_less_than_a_thousandth_of_auc(pool: WorkerPool, data: Path) -> None:
    """On clicks from a known model. The dense part computes in bf16 where it is told to, but not
    in evaluation, where rounded logits would be ties."""
    found = {switch: pool.run(auc_of, data, switch)[0] for switch in SWITCHES}
    plain = found["plain"][0]
    assert plain > 0.7
    for switch, (auc, dtypes) in found.items():
        assert abs(auc - plain) < 0.001, (switch, auc, plain)
        trained_in = torch.bfloat16 if switch == "bf16 dense" else torch.float32
        assert dtypes == {(True, trained_in), (False, torch.float32)}
    assert len({auc for auc, _ in found.values()}) == len(SWITCHES)


def chosen(bf16_ranks: tuple[int, ...], surplus: int) -> tuple[str | None, set[torch.dtype]]:
    """The precision of a trainer told nothing, where a step has `surplus` products too many or too
    few, and in what the model computed."""
    model, rows = Clicks(DataType.FP32), 8
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "bags" not in n)
    tables = tables_from_module(model)
    plan = plan_by_rule(tables, current_topology(), ShardingRule(sharding_type="row_wise"))
    dtypes, trainer = model.dtypes, Trainer(shard_model(model, plan))
    lengths = torch.ones(len(TABLES) * rows, dtype=torch.long)
    ids = KeyedJaggedTensor(list(TABLES), torch.zeros_like(lengths), lengths=lengths)
    global_rows = rows * dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_precision, "has_bf16", lambda _: dist.get_rank() in bf16_ranks)
        patch.setattr(dense_precision, "ENOUGH_PRODUCTS", global_rows * weights - surplus)
        trainer.train_step(
            Batch(torch.zeros(rows, 2), ids, torch.zeros(rows), torch.ones(rows), global_rows)
        )
    return trainer.dense_precision, {dtype for is_training, dtype in dtypes if is_training}


@two_ranks
def test_bf16_is_chosen_where_it_pays_on_all_ranks(pool: WorkerPool) -> None:
    """By products of matrices alone: biases and tables do not count."""
    for ranks, surplus, expected in [
        ((0, 1), 0, ("bf16", {torch.bfloat16})),
        ((0, 1), -1, ("fp32", {torch.float32})),
        ((0,), 0, ("fp32", {torch.float32})),
    ]:
        assert pool.run(chosen, ranks, surplus) == [expected] * 2


def test_the_processor_says_whether_it_has_bf16() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert has_bf16(torch.device("cpu")) == ("bf16" in flags)
