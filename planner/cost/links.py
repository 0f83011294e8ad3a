"""Bytes of a plan's collectives in one host, and what a profile makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.cost.communication import CollectiveTimes, rank_loads
from planner.cost.features import ShardWork, whole_tables
from planner.cost.measurements import Collective
from planner.shards import TYPE_CODE, Bools, Floats, Ints, ShardColumns
from planner.storage import ID_BYTES, OUTPUT_BYTES
from planner.topology import Topology

OFFSET_BYTES = 8  # lengths of bags are sent as int64
_CUT_BY_ROW = [TYPE_CODE[name] for name in ("row_wise", "table_row_wise", "grid_shard")]

Times = Mapping[Collective, CollectiveTimes]


@dataclass(frozen=True)
class LinkBytes:
    """What each shard [shards] has sent, all ranks together.

    Embeddings go by all-to-all, and so do their gradients; those of pooled row shards are reduced
    and scattered, their gradients gathered; gradients of replicated tables are reduced for all.
    """

    world_size: int
    ids: Floats
    embeddings: Floats
    replicated: Floats  # bytes of the table
    is_summed: Bools
    even_embeddings: float  # of all tables

    @classmethod
    def of(cls, shards: ShardColumns, topology: Topology, batch_size: int) -> LinkBytes:
        work = ShardWork.of(shards, topology, batch_size)
        replicated = shards.sharding_type == TYPE_CODE["data_parallel"]
        pooled = shards.of_table("pooled")
        ids = work.lookups * ID_BYTES + work.bags * OFFSET_BYTES
        return cls(
            world_size=topology.world_size,
            ids=np.where(replicated, 0.0, ids),
            embeddings=np.where(replicated, 0.0, _embedding_bytes(work, pooled)),
            replicated=np.where(replicated, work.rows * work.columns * work.element_bytes, 0.0),
            is_summed=pooled & np.isin(shards.sharding_type, _CUT_BY_ROW),
            even_embeddings=_all_embeddings(shards, topology, batch_size),
        )

    def charges(self, times: Times) -> Floats:
        """[shards, 2]: ms that each adds to the forward and backward of its rank."""
        others = (self.world_size - 1) / self.world_size
        even = self.even_embeddings * others
        loads: dict[Collective, float] = {
            "all_to_all": even / self.world_size,
            "reduce_scatter": even,
            "all_gather": even,
        }
        slope = {k: float(times[k].ms_per_byte(np.array([size]))[0]) for k, size in loads.items()}
        sent = self.embeddings * others
        forward = np.where(
            self.is_summed, slope["reduce_scatter"] * sent, slope["all_to_all"] * sent
        )
        backward = np.where(self.is_summed, slope["all_gather"] * sent, slope["all_to_all"] * sent)
        reduced = self.replicated * 2 * others
        all_reduce = times["all_reduce"].ms_per_byte(reduced) * reduced
        ids = slope["all_to_all"] * self.ids * others
        return np.stack([forward + ids, backward + all_reduce], axis=1)

    def stage_ms(self, times: Times, ranks: Ints) -> Floats:
        """[plans, 2]: forward and backward of plans that have each shard on a rank, `ranks`
        [plans, shards]."""
        ids = self._exchange_ms(times, self.ids, ranks, backwards=True)
        whole = ~self.is_summed
        exchange = self._exchange_ms(times, self.embeddings * whole, ranks)
        # Row shards of a table are on all ranks of the host, and each has all bags.
        summed = self.embeddings[self.is_summed].sum() / self.world_size
        reduced = self.replicated.sum() / self.world_size
        forward = ids + exchange + self._even_ms(times, "reduce_scatter", summed)
        gathered = self._even_ms(times, "all_gather", summed)
        backward = exchange + gathered + self._even_ms(times, "all_reduce", reduced)
        return np.stack([forward, backward], axis=1)

    def _exchange_ms(
        self, times: Times, sent: Floats, ranks: Ints, backwards: bool = False
    ) -> Floats:
        """[plans]: an all-to-all in which each rank sends its part to all others, or gets it from
        them."""
        if not sent.any():
            return np.zeros(len(ranks))
        by_rank = [np.bincount(own, sent, minlength=self.world_size) for own in ranks]
        loads = rank_loads("all_to_all", np.array(by_rank) / self.world_size)
        return times["all_to_all"].ms(loads[:, [1, 0, 2]] if backwards else loads)

    def _even_ms(self, times: Times, kind: Collective, size: float) -> float:
        if size == 0:
            return 0.0
        sent = np.full((1, self.world_size), size)
        return float(times[kind].ms(rank_loads(kind, sent))[0])


def _embedding_bytes(work: ShardWork, pooled: Bools) -> Floats:
    return np.asarray(np.where(pooled, work.bags, work.lookups) * work.columns * OUTPUT_BYTES)


def _all_embeddings(shards: ShardColumns, topology: Topology, batch_size: int) -> float:
    whole = whole_tables(shards.tables)
    work = ShardWork.of(whole, topology, batch_size)
    return float(_embedding_bytes(work, whole.tables.pooled).sum())
