"""Bytes that a plan's collectives move in one host, counted by hand, at a millisecond a byte."""

from __future__ import annotations

import numpy as np
import pytest

from planner import Plan, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.cost.communication import CollectiveTimes, rank_loads
from planner.cost.links import LinkBytes
from planner.cost.measurements import COLLECTIVES
from planner.cost.networks import ConvexHead
from planner.cost.predict import shards_of, table_specs

RANKS, BATCH_SIZE = 4, 10
TOPOLOGY = Topology(world_size=RANKS, local_world_size=RANKS)
NARROW = TableSpec(name="narrow", num_embeddings=100, embedding_dim=8, pooling_factor=2)
WIDE = TableSpec(name="wide", num_embeddings=40, embedding_dim=32, pooling_factor=5)
# A millisecond for each byte that the busiest rank sends, and nothing else.
TIMES = {
    kind: CollectiveTimes(
        head=ConvexHead(weights=[[1.0, 0.0, 0.0]], biases=[0.0]),
        margin=0.0,
        world_size=RANKS,
        measured=1,
    )
    for kind in COLLECTIVES
}


def _plan(rules: dict[str, ShardingRule]) -> Plan:
    default = ShardingRule(sharding_type="table_wise", ranks=(0,))
    return plan_by_rule([NARROW, WIDE], TOPOLOGY, default, rules)


def _links(plan: Plan) -> tuple[LinkBytes, np.ndarray]:
    shards, rank = shards_of(plan, table_specs(plan))
    return LinkBytes.of(shards, TOPOLOGY, BATCH_SIZE), rank


def test_whole_tables_send_their_embeddings() -> None:
    """The rank of the wide table sends 32 floats for each of the 30 rows of other ranks; ids come
    from all ranks: of those each sends its part to the others that have a table."""
    plan = _plan({"wide": ShardingRule(sharding_type="table_wise", ranks=(1,))})
    links, rank = _links(plan)
    forward, backward = links.stage_ms(TIMES, rank[None])[0]
    assert backward == 30 * 32 * 4
    # Ids: 2 or 5 ids and an offset of 8 bytes for each of a rank's rows, to other ranks.
    ids = (10 * (2 + 1) + 10 * (5 + 1)) * 8
    assert forward == backward + ids


def test_row_shards_are_summed() -> None:
    """Every rank gives sums for all 40 rows to a ring, three quarters of it pass each rank."""
    plan = _plan({"wide": ShardingRule(sharding_type="row_wise")})
    links, rank = _links(plan)
    backward = links.stage_ms(TIMES, rank[None])[0, 1]
    assert backward == 30 * 8 * 4 + 40 * 32 * 4 * 3 / 4


def test_replicated_tables_send_gradients_only() -> None:
    """A ring passes them on twice."""
    alike = ShardingRule(sharding_type="data_parallel")
    links, rank = _links(_plan({"wide": alike, "narrow": alike}))
    gradients = (40 * 32 + 100 * 8) * 4
    assert links.stage_ms(TIMES, rank[None])[0] == pytest.approx([0, gradients * 2 * 3 / 4])


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "data_parallel"])
def test_charges_of_even_plans_are_what_collectives_take(sharding_type: str) -> None:
    """Where all ranks send alike; embeddings and gradients, and of ids no more than that."""
    plan = plan_by_rule(
        [NARROW.model_copy(update={"name": f"t{i}"}) for i in range(RANKS)],
        TOPOLOGY,
        ShardingRule(sharding_type=sharding_type),
    )
    links, rank = _links(plan)
    charges = links.charges(TIMES)
    summed = np.stack([np.bincount(rank, charges[:, stage]) for stage in (0, 1)], axis=1)
    assert summed.max(axis=0) == pytest.approx(links.stage_ms(TIMES, rank[None])[0])


def test_the_order_of_ranks_does_not_matter() -> None:
    """The busiest sender, the busiest receiver, and the mean: by hand for three ranks."""
    sent = np.array([[100.0, 50.0, 0.0]])
    assert rank_loads("all_to_all", sent).tolist() == [[200.0, 150.0, 100.0]]
    assert rank_loads("all_to_all", sent[:, [2, 0, 1]]).tolist() == [[200.0, 150.0, 100.0]]
