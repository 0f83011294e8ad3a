"""Plans in TorchRec's serialized form: what is written, and what is refused when read.

That it is TorchRec's form is shown in tests/shardemb/test_torchrec_plan.py.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from planner import PlannerError, RequestError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from planner.hardware import preset
from planner.torchrec_json import export_torchrec, import_torchrec

TOPOLOGY = Topology(world_size=4, local_world_size=2)
TABLE = TableSpec(name="t", num_embeddings=10, embedding_dim=8)


def test_a_plan_written_out() -> None:
    """A row-wise and a replicated table, in full."""
    tables = [TABLE, TABLE.model_copy(update={"name": "r"})]
    rules = {"r": ShardingRule(sharding_type="data_parallel")}
    plan = plan_by_rule(tables, TOPOLOGY, ShardingRule(sharding_type="row_wise"), rules)
    row_wise = {
        "sharding_type": "row_wise",
        "compute_kernel": "fused",
        "ranks": [0, 1, 2, 3],
        "shards": [
            {"shard_offsets": [0, 0], "shard_sizes": [3, 8], "placement": "rank:0/cuda:0"},
            {"shard_offsets": [3, 0], "shard_sizes": [3, 8], "placement": "rank:1/cuda:1"},
            {"shard_offsets": [6, 0], "shard_sizes": [3, 8], "placement": "rank:2/cuda:0"},
            {"shard_offsets": [9, 0], "shard_sizes": [1, 8], "placement": "rank:3/cuda:1"},
        ],
    }
    replicated = {
        "sharding_type": "data_parallel",
        "compute_kernel": "dense",
        "ranks": [0, 1, 2, 3],
    }
    assert export_torchrec(plan) == {"t": row_wise, "r": replicated}
    both = {"plan": {"sparse": {"t": row_wise, "r": replicated}}}
    assert export_torchrec(plan, "sparse") == both
    apart = {"plan": {"a.b": {"t": row_wise}, "c": {"r": replicated}}}
    assert export_torchrec(plan, {"t": "a.b", "r": "c"}) == apart
    with pytest.raises(PlannerError, match="table r of the plan is in no module"):
        export_torchrec(plan, {"t": "a.b"})
    on_cpu = export_torchrec(plan, device_type="cpu")["t"]["shards"]
    assert [shard["placement"] for shard in on_cpu] == [f"rank:{r}/cpu" for r in range(4)]


@pytest.mark.parametrize("modules", [None, "x", "plan"])
def test_both_forms_are_read(modules: str | None) -> None:
    """A plan of one module, and one with the paths of modules, after a trip through text; also
    where the table or the module is called `plan`."""
    for name in ("t", "plan"):
        table = TABLE.model_copy(update={"name": name})
        plan = plan_by_rule([table], TOPOLOGY, ShardingRule(sharding_type="grid_shard"))
        text = json.dumps(export_torchrec(plan, modules))
        assert import_torchrec(json.loads(text), [table], TOPOLOGY) == plan


def test_host_memory_and_limits_are_filled_in() -> None:
    """Tables in host memory are counted there; without a factor TorchRec caches 0.2 of the rows."""
    topology = TOPOLOGY.model_copy(update={"hardware": preset("torchrec-80GB")})
    table = TABLE.model_copy(update={"num_embeddings": 1000, "optimizer": "sgd"})
    plan = plan_by_rule([table], topology, ShardingRule(sharding_type="table_wise", ranks=(3,)))
    document = export_torchrec(plan)
    document["t"]["compute_kernel"] = "fused_uvm_caching"
    found = import_torchrec(document, [table], topology)
    assert found.tables["t"].cache_load_factor == 0.2
    # 200 rows of 8 fp32 in seven sets of 32, two int64 each; an int32 for each of all rows.
    cache = 7 * 32 * (8 * 4 + 16) + 1000 * 4
    assert [device.memory_bytes for device in found.devices] == [0, 0, 0, cache]
    assert found.devices[3].memory_limit_bytes == int(80 * 2**30 * 0.85)
    assert [host.memory_bytes for host in found.hosts] == [0, 1000 * 8 * 4]
    document["t"]["cache_params"] = {"load_factor": 0.5}
    assert import_torchrec(document, [table], topology).tables["t"].cache_load_factor == 0.5


def exported(sharding_type: str, **rule: Any) -> dict[str, Any]:
    rule = ShardingRule(sharding_type=sharding_type, **rule)
    return export_torchrec(plan_by_rule([TABLE], TOPOLOGY, rule), "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharding_type": "diagonal"}, "plan.m.t.sharding_type: .*'table_wise'.*found 'diagonal'"),
        ({"compute_kernel": "key_value"}, "plan.m.t.compute_kernel: .*found 'key_value'"),
        ({"shards": None}, "table t of TorchRec's plan is row_wise, but has no shards"),
        ({"ranks": [1, 0, 2, 3]}, r"has ranks \[1, 0, 2, 3\], its shards have placements on"),
        ({"cache_params": {"load_factor": 2.0}}, "plan.m.t.cache_params.load_factor: .*found 2.0"),
        ({"shards": [{"shard_sizes": [1, 2]}]}, "plan.m.t.shards.0.shard_offsets: required"),
    ],
)
def test_no_plan_of_torchrecs(change: dict[str, Any], message: str) -> None:
    """What is not a plan is refused with the path of the key, the reason and what was found."""
    document = exported("row_wise")
    document["plan"]["m"]["t"].update(change)
    with pytest.raises(RequestError, match=message):
        import_torchrec(document, [TABLE], TOPOLOGY)


@pytest.mark.parametrize("document", [{"plan": []}, {"plan": {"m": 3}}, {"t": 1}])
def test_something_else(document: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="this is no plan of TorchRec's"):
        import_torchrec(document, [TABLE], TOPOLOGY)


def test_a_table_twice() -> None:
    document = exported("table_wise")
    document["plan"]["n"] = document["plan"]["m"]
    with pytest.raises(RequestError, match="two modules of TorchRec's plan have a table t"):
        import_torchrec(document, [TABLE], TOPOLOGY)


def test_other_tables() -> None:
    """Tables that are missing, too many, or of another size are named."""
    document = exported("row_wise")
    other = TABLE.model_copy(update={"name": "u"})
    with pytest.raises(PlannerError, match="table u is not in TorchRec's plan"):
        import_torchrec(document, [TABLE, other], TOPOLOGY)
    with pytest.raises(PlannerError, match="table t is only in TorchRec's plan"):
        import_torchrec(document, [], TOPOLOGY)
    wide = TABLE.model_copy(update={"embedding_dim": 12})
    with pytest.raises(PlannerError, match="its 4 shards are not those of a 10 x 12 table"):
        import_torchrec(document, [wide], TOPOLOGY)


@pytest.mark.parametrize("sharding_type", [t for t in SHARDING_TYPES if t != "data_parallel"])
@pytest.mark.parametrize("key", ["shard_offsets", "shard_sizes"])
@pytest.mark.parametrize("axis", [0, 1])
def test_shards_that_do_not_make_up_the_table(sharding_type: str, key: str, axis: int) -> None:
    """A gap or an overlap in any shard is found, in rows and in columns."""
    intact = exported(sharding_type)
    import_torchrec(intact, [TABLE], TOPOLOGY)
    for i in range(len(intact["plan"]["m"]["t"]["shards"])):
        document = copy.deepcopy(intact)
        document["plan"]["m"]["t"]["shards"][i][key][axis] += 1
        with pytest.raises(PlannerError, match=f"table cut {sharding_type} for 4 devices, 2 a"):
            import_torchrec(document, [TABLE], TOPOLOGY)


def test_column_shards_of_several_widths() -> None:
    """TorchRec runs column shards of any whole vectors; other types have but one column shard."""
    document = exported("column_wise", column_shards=2)
    table = TABLE.model_copy(update={"embedding_dim": 12})
    document["plan"]["m"]["t"]["shards"][1]["shard_sizes"] = [10, 8]
    plan = import_torchrec(document, [table], TOPOLOGY)
    assert [shard.columns for shard in plan.tables["t"].shards] == [4, 8]
    document["plan"]["m"]["t"]["sharding_type"] = "table_wise"
    with pytest.raises(PlannerError, match="its 2 shards are not"):
        import_torchrec(document, [table], TOPOLOGY)


@pytest.mark.parametrize(
    ("sharding_type", "ranks"),
    [
        ("table_wise", [4]),
        ("row_wise", [1, 0, 2, 3]),
        ("column_wise", [0, 7]),
        ("table_row_wise", [1, 2]),
        ("table_row_wise", [1, 0]),
        ("table_column_wise", [1, 2]),
        ("grid_shard", [0, 1, 1, 2]),
    ],
)
def test_ranks_that_cannot_hold_a_type(sharding_type: str, ranks: list[int]) -> None:
    """Ranks beyond the last, and orders and hosts that TorchRec's lookups do not expect."""
    document = exported(sharding_type)
    entry = document["plan"]["m"]["t"]
    entry["ranks"] = ranks
    for shard, rank in zip(entry["shards"], ranks, strict=True):
        shard["placement"] = f"rank:{rank}/cuda:0"
    with pytest.raises(PlannerError, match=f"cannot hold it {sharding_type} on 4 devices"):
        import_torchrec(document, [TABLE], TOPOLOGY)
