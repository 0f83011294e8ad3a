"""The options that are listed are those that TorchRec can run and the constraints admit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from planner import RequestError, TableSpec, Topology
from planner.constraints import TableConstraint
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.geometry import SHARDING_TYPES
from planner.options import Problem, make_problem
from planner.shards import COMPUTE_KERNELS
from planner.topology import parse_topology

TWO_HOSTS = parse_topology("2x4xA100-80GB")


def table(name: str = "t", **fields: object) -> TableSpec:
    return TableSpec(**{"name": name, "num_embeddings": 1000, "embedding_dim": 32, **fields})


def problem(*tables: TableSpec, topology: Topology = TWO_HOSTS, **constraints: object) -> Problem:
    limits = {name: TableConstraint.model_validate(fields) for name, fields in constraints.items()}
    return make_problem(tables, topology, TorchRecEstimate(64), 64, limits)


def listed(found: Problem, kernel: str = "fused") -> Counter[tuple[str, int]]:
    """How often each (type, column shards) is there."""
    options = found.options
    return Counter(
        (SHARDING_TYPES[options.sharding_type[i]], int(options.column_shards[i]))
        for i in range(len(options))
        if COMPUTE_KERNELS[options.compute_kernel[i]] in (kernel, "dense")
    )


def test_all_types_and_all_column_counts() -> None:
    """32 columns on 2 hosts of 4: counts that divide eight vectors, up to what there is."""
    assert listed(problem(table())) == Counter(
        [
            ("table_wise", 1),
            ("row_wise", 1),
            ("data_parallel", 1),
            ("table_row_wise", 1),
            *[("column_wise", k) for k in (2, 4, 8)],
            *[("table_column_wise", k) for k in (2, 4)],
            ("grid_shard", 2),
        ]
    )


def test_uneven_counts() -> None:
    """96 columns can be cut into 3, 6 and 12 pieces too, as far as there are devices."""
    counts = {k for kind, k in listed(problem(table(embedding_dim=96))) if kind == "column_wise"}
    assert counts == {2, 3, 4, 6, 8}


def test_one_host_repeats_nothing() -> None:
    one_host = parse_topology("1x4xA100-80GB")
    kinds = {kind for kind, _ in listed(problem(table(), topology=one_host))}
    assert kinds == {"table_wise", "row_wise", "data_parallel", "column_wise"}


def test_a_width_that_kernels_refuse_is_only_replicated() -> None:
    assert set(listed(problem(table(embedding_dim=6)))) == {("data_parallel", 1)}


def test_unpooled_tables_have_the_types_of_embedding_collections() -> None:
    kinds = {kind for kind, _ in listed(problem(table(pooled=False)))}
    assert kinds == {"table_wise", "row_wise", "column_wise", "data_parallel"}


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"sharding_types": ["row_wise"]}, {("row_wise", 1)}),
        ({"sharding_types": ["column_wise"], "column_shards": 4}, {("column_wise", 4)}),
        ({"sharding_types": ["grid_shard"]}, {("grid_shard", 2)}),
        (
            {"sharding_types": ["table_wise", "column_wise"], "min_columns": 16},
            {("table_wise", 1), ("column_wise", 2)},
        ),
        ({"sharding_types": ["column_wise"], "min_columns": 32}, {("column_wise", 1)}),
        ({"compute_kernels": ["dense"]}, {("data_parallel", 1)}),
    ],
)
def test_constraints(constraint: dict, expected: set) -> None:
    assert set(listed(problem(table(), t=constraint))) == expected


def test_pinned_ranks_leave_types_that_need_no_others() -> None:
    """Three of four ranks of a host: nothing that loads a whole host or all devices."""
    kinds = {kind for kind, _ in listed(problem(table(), t={"ranks": [0, 1, 2]}))}
    assert kinds == {"table_wise", "column_wise", "table_column_wise"}
    kinds = {kind for kind, _ in listed(problem(table(), t={"ranks": [4, 5, 6, 7]}))}
    assert "table_row_wise" in kinds and "row_wise" not in kinds


def test_a_group_is_one_unit_with_the_cost_of_all() -> None:
    together = problem(table("a"), table("b"), table("c"), a={"group": "g"}, b={"group": "g"})
    assert together.units == ((0, 1), (2,))
    apart = problem(table("a"), table("b"), table("c"))

    def cost(found: Problem, unit: int) -> np.ndarray:
        kind = SHARDING_TYPES.index("table_wise")
        fused = (found.options.unit == unit) & (found.options.sharding_type == kind)
        return found.options.cost[fused & (found.options.compute_kernel == 0)][0]

    assert cost(together, 0) == pytest.approx(cost(apart, 0) + cost(apart, 1))
    assert ("column_wise", 2) not in listed(
        problem(table("a"), table("b"), a={"group": "g"}, b={"group": "g"})
    )


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"x": {}}, "constraints.x: there is no such table"),
        ({"t": {"ranks": [8]}}, "constraints.t.ranks: 8 is no rank; there are ranks 0 to 7"),
        (
            {"t": {"sharding_types": ["row_wise"], "compute_kernels": ["dense"]}},
            "constraints leave no way to shard t",
        ),
        (
            {"t": {"sharding_types": ["row_wise"], "ranks": [0, 1]}},
            "constraints leave no way to shard t",
        ),
        (
            {"t": {"sharding_types": ["column_wise"], "column_shards": 4, "ranks": [0, 1]}},
            "constraints leave no way to shard t",
        ),
        (
            {"t": {"group": "g", "ranks": [0]}, "u": {"group": "g", "ranks": [1]}},
            "constraints.ranks of t, u, one group, have no rank in common",
        ),
    ],
)
def test_contradictions_are_named(constraints: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        problem(table(), table("u"), **constraints)


def test_no_tables() -> None:
    with pytest.raises(RequestError, match="there are no tables to plan for"):
        problem()
