"""Plans go to TorchRec and come back, ours and its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner import Topology as TorchRecTopology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardingPlan

from planner import Plan, PlannerError, ShardingRule, TablePlan, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES, ShardingType
from planner.torchrec_json import export_torchrec
from shardemb import (
    plan_from_torchrec,
    tables_from_module,
    to_torchrec,
    torchrec_from_json,
    torchrec_to_json,
)
from shardemb.sharding.limits import UNPOOLED_TYPES

SHAPES = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 4)]
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")


def bag_config(name: str, rows: int, dim: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"]
    )


class Inner(nn.Module):
    def __init__(self, configs: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(configs, is_weighted=True, device="meta")


class Model(nn.Module):
    """Tables at three places: pooled, pooled with weights one level down, and unpooled."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = EmbeddingBagCollection(
            [bag_config("a", 10, 8), bag_config("b", 1000, 64), bag_config("c", 3, 4)],
            device="meta",
        )
        self.inner = Inner([bag_config("d", 77, 32), bag_config("e", 500, 12)])
        config = EmbeddingConfig(
            name="s", num_embeddings=40, embedding_dim=16, feature_names=["f_s"]
        )
        self.unpooled = EmbeddingCollection([config], device="meta")


MODULES = {"a": "pooled", "b": "pooled", "c": "pooled", "d": "inner.bags", "e": "inner.bags"}
MODULES["s"] = "unpooled"


@st.composite
def random_plans(draw: st.DrawFn) -> Plan:
    """Any types, column counts and places; kernels of any kind, caches of any size."""
    world_size, local = draw(st.sampled_from(SHAPES))
    topology = Topology(world_size=world_size, local_world_size=local)
    rules = {}
    for table in tables_from_module(Model()):
        sharding_type: ShardingType = draw(
            st.sampled_from(SHARDING_TYPES if table.pooled else UNPOOLED_TYPES)
        )
        counts = [k for k in range(1, 9) if table.embedding_dim % (4 * k) == 0]
        rules[table.name] = ShardingRule(
            sharding_type=sharding_type, column_shards=draw(st.sampled_from(counts))
        )
    plan = plan_by_rule(tables_from_module(Model()), topology, rules["a"], rules)
    tables = {name: draw(_with_kernel(table)) for name, table in plan.tables.items()}
    return plan.model_copy(update={"tables": tables})


@st.composite
def _with_kernel(draw: st.DrawFn, table: TablePlan) -> TablePlan:
    if table.sharding_type == "data_parallel":
        return table
    kernel = draw(st.sampled_from(KERNELS))
    factor = draw(st.floats(0.01, 1)) if kernel == "fused_uvm_caching" else None
    return table.model_copy(update={"compute_kernel": kernel, "cache_load_factor": factor})


def decisions(plan: Plan) -> dict[str, Any]:
    """All that a plan decides: no memory, which depends on the kernel."""
    leave_out = {"shards": {"__all__": {"memory_bytes", "host_memory_bytes"}}}
    return {name: table.model_dump(exclude=leave_out) for name, table in plan.tables.items()}


@settings(deadline=None, max_examples=200)
@given(plan=random_plans(), device=st.sampled_from(["cpu", "cuda"]))
def test_there_and_back(plan: Plan, device: str) -> None:
    """Plan -> TorchRec -> Plan decides the same, for every type, kernel and number of shards."""
    model = Model()
    theirs = to_torchrec(plan, model, torch.device(device))
    assert theirs.plan.keys() == {"pooled", "inner.bags", "unpooled"}
    back = plan_from_torchrec(theirs, model, plan.topology)
    assert decisions(back) == decisions(plan)
    assert back == plan_from_torchrec(theirs, tables_from_module(model), plan.topology)


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_plan_comes_back(sharding_type: ShardingType, shape: tuple[int, int]) -> None:
    """Of a plan by rule, memory and all."""
    topology = Topology(world_size=shape[0], local_world_size=shape[1])
    tables = tables_from_module(Model())
    plan = plan_by_rule(tables, topology, ShardingRule(sharding_type=sharding_type))
    theirs = to_torchrec(plan, Model(), torch.device("cpu"))
    assert plan_from_torchrec(theirs, Model(), topology) == plan


@settings(deadline=None, max_examples=100)
@given(plan=random_plans(), device=st.sampled_from(["cpu", "cuda"]))
def test_the_json_is_torchrecs(plan: Plan, device: str) -> None:
    """What is exported, without torch, is what TorchRec serializes, and the sizes of caches."""
    theirs = to_torchrec(plan, Model(), torch.device(device))
    document = json.loads(json.dumps(export_torchrec(plan, MODULES, device)))
    assert torchrec_to_json(theirs) == document
    assert torchrec_from_json(document) == theirs
    caches = {
        name: entry.pop("cache_params")["load_factor"]
        for module in document["plan"].values()
        for name, entry in module.items()
        if "cache_params" in entry
    }
    assert document == theirs._serialize()
    factors = {name: table.cache_load_factor for name, table in plan.tables.items()}
    assert caches == {name: factor for name, factor in factors.items() if factor is not None}


def test_a_plan_of_one_module() -> None:
    """The form without a path is that of EmbeddingModuleShardingPlan."""
    model = EmbeddingBagCollection([bag_config("a", 10, 8)], device="meta")
    topology = Topology(world_size=4, local_world_size=2)
    rule = ShardingRule(sharding_type="grid_shard", column_shards=2)
    plan = plan_by_rule(tables_from_module(model), topology, rule)
    document = export_torchrec(plan)
    module_plan = to_torchrec(plan, model, torch.device("cuda")).plan[""]
    assert document == module_plan._serialize()
    assert plan_from_torchrec(module_plan, model, topology) == plan
    assert torchrec_from_json(document, "x.y") == ShardingPlan({"x.y": module_plan})


def table_sharding(plan: ShardingPlan, path: str, table: str) -> ParameterSharding:
    return plan.plan[path][table]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_caches(kernel: str) -> None:
    """Every kernel is named to TorchRec, and the cache's share of the rows with it."""
    topology = Topology(world_size=2, local_world_size=2)
    plan = plan_by_rule(
        tables_from_module(Model()), topology, ShardingRule(sharding_type="table_wise")
    )
    factor = 0.3 if kernel == "fused_uvm_caching" else None
    update = {"compute_kernel": kernel, "cache_load_factor": factor}
    tables = {**plan.tables, "a": plan.tables["a"].model_copy(update=update)}
    tables["b"] = plan_by_rule(
        [plan.tables["b"].spec], topology, ShardingRule(sharding_type="data_parallel")
    ).tables["b"]
    changed = plan.model_copy(update={"tables": tables})
    theirs = to_torchrec(changed, Model(), torch.device("cuda"))
    found = table_sharding(theirs, "pooled", "a")
    assert found.compute_kernel == kernel
    assert found.cache_params == (None if factor is None else CacheParams(load_factor=0.3))
    replicated = table_sharding(theirs, "pooled", "b")
    assert (replicated.compute_kernel, replicated.sharding_spec) == ("dense", None)


def test_other_tables_are_refused() -> None:
    """A model that lacks a table of the plan, or has one more."""
    topology = Topology(world_size=2, local_world_size=2)
    model = Model()
    plan = plan_by_rule(
        tables_from_module(model), topology, ShardingRule(sharding_type="table_wise")
    )
    with pytest.raises(PlannerError, match="the plan has table s, the run has not"):
        to_torchrec(plan, nn.ModuleList([model.pooled, model.inner]), torch.device("cpu"))
    extra = EmbeddingBagCollection([bag_config("x", 5, 4)], device="meta")
    with pytest.raises(PlannerError, match="table x is not in the plan"):
        to_torchrec(plan, nn.ModuleList([model, extra]), torch.device("cpu"))


# EmbeddingShardingPlanner's own choice, and what it chooses when only some types are allowed.
CHOICES: list[tuple[list[str], list[str]] | None] = [
    None,
    *(([kind], ["fused", "dense"]) for kind in SHARDING_TYPES),
    (["table_wise", "column_wise", "row_wise"], ["fused_uvm", "fused_uvm_caching"]),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("world_size", "local"), [(4, 4), (4, 2), (16, 8)])
def test_plans_of_torchrecs_planner(
    world_size: int, local: int, choice: tuple[list[str], list[str]] | None
) -> None:
    """A plan that TorchRec makes is imported, and exported again is the very same."""
    model = Model().pooled if choice else Model()
    theirs = plan_of_torchrec(model, world_size, local, choice)
    topology = Topology(world_size=world_size, local_world_size=local)
    plan = plan_from_torchrec(theirs, model, topology)
    if choice:
        assert {table.sharding_type for table in plan.tables.values()} <= set(choice[0])
        assert {table.compute_kernel for table in plan.tables.values()} <= set(choice[1])
    again = to_torchrec(plan, model, torch.device("cuda"))
    assert torchrec_to_json(again) == torchrec_to_json(theirs)
    assert again == theirs


def plan_of_torchrec(
    model: nn.Module, world_size: int, local: int, choice: tuple[list[str], list[str]] | None
) -> ShardingPlan:
    constraints = None
    if choice is not None:
        constraints = {
            table.name: ParameterConstraints(
                sharding_types=choice[0],
                compute_kernels=choice[1],
                min_partition=4,
                cache_params=CacheParams(load_factor=0.25) if choice[1][0] != "fused" else None,
            )
            for table in tables_from_module(model)
        }
    planner = EmbeddingShardingPlanner(
        topology=TorchRecTopology(
            world_size=world_size, local_world_size=local, compute_device="cuda"
        ),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.15),
    )
    return planner.plan(model, [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()])


def test_plans_made_with_torchrecs_functions() -> None:
    """`construct_module_sharding_plan`: one of each kind, with columns of several widths."""
    makers = {"a": table_wise(rank=3), "b": row_wise(), "c": data_parallel()}
    makers |= {"d": table_row_wise(host_index=1), "e": column_wise(ranks=[2, 0, 2])}
    makers |= {"g": grid_shard(host_indexes=[1, 0])}
    makers |= {"h": column_wise(size_per_rank=[8, 4, 4, 16])}
    dims = {"a": 8, "b": 64, "c": 4, "d": 32, "e": 12, "g": 256, "h": 32}
    configs = [bag_config(name, 50, dim) for name, dim in dims.items()]
    model = EmbeddingBagCollection(configs, device="meta")
    theirs = construct_module_sharding_plan(
        model, makers, local_size=2, world_size=4, device_type="cuda"
    )
    plan = plan_from_torchrec(theirs, model, Topology(world_size=4, local_world_size=2))

    def places(name: str) -> list[tuple[int, ...]]:
        return [
            (s.rank, s.row_offset, s.rows, s.column_offset, s.columns)
            for s in plan.tables[name].shards
        ]

    assert places("a") == [(3, 0, 50, 0, 8)]
    assert places("c") == [(rank, 0, 50, 0, 4) for rank in range(4)]
    assert places("d") == [(2, 0, 25, 0, 32), (3, 25, 25, 0, 32)]
    assert places("e") == [(2, 0, 50, 0, 4), (0, 0, 50, 4, 4), (2, 0, 50, 8, 4)]
    assert [place[0] for place in places("g")] == [2, 3, 0, 1]
    assert [place[3:] for place in places("h")] == [(0, 8), (8, 4), (12, 4), (16, 16)]
    assert to_torchrec(plan, model, torch.device("cuda")).plan[""] == theirs
