"""What a plan's stages take beyond its kernels and collectives: fitted to plans that were run.

TorchRec runs a kernel and an exchange of ids and of embeddings for each sharding type; around each
it splits, permutes and concatenates. Tables of the type `data_parallel` are looked up by kernels of
their own, and their gradients are summed over ranks and applied after backward. Which of these a
step waits for differs from machine to machine, so a stage is taken as a sum of them all with
weights >= 0 that are fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from planner.cost.features import ShardWork, sum_by
from planner.cost.links import LinkBytes, Times
from planner.cost.networks import Part, Vector
from planner.cost.stages import COMPUTE
from planner.shards import TYPE_CODE, Bools, Floats, Ints, ShardColumns
from planner.storage import ID_BYTES, OUTPUT_BYTES
from planner.topology import Topology

# Of some of the shards, each rank's in one kernel: [ranks, 2], forward and backward.
KernelMs = Callable[[Bools], Floats]

# Of a rank: forward_compute and backward_compute are sums of these.
KERNEL_LOADS = (
    "fixed",
    "kernels",
    "fused_ms",
    "replicated",
    "replicated_ms",
    "replicated_tables",
    "replicated_bytes",
)
# Of all ranks, the busiest where they differ: forward_comm and backward_comm.
LINK_LOADS = (
    "fixed",
    "exchanges",
    "features",
    "collectives_ms",
    "id_bytes",
    "row_id_bytes",
    "row_bags",
    "sent_bytes",
    "output_bytes",
)
_FUSED = KERNEL_LOADS.index("fused_ms")
_REPLICATED = slice(KERNEL_LOADS.index("replicated"), None)
_OF_REPLICATED = slice(KERNEL_LOADS.index("replicated_ms"), None)  # of each table
_COLLECTIVES = LINK_LOADS.index("collectives_ms")
_OF_SHARDS = slice(_COLLECTIVES + 1, -1)


class PlanTimes(Part):
    """The weights of loads, in ms, for one number of ranks."""

    world_size: int = Field(gt=0)
    measured: int = Field(gt=0, description="how many plans")
    forward_compute: Vector = Field(description="of KERNEL_LOADS")
    backward_compute: Vector = Field(description="of KERNEL_LOADS")
    forward_comm: Vector = Field(description="of LINK_LOADS")
    backward_comm: Vector = Field(description="of LINK_LOADS")
    margins: tuple[float, float, float, float] = Field(
        description="half of the intervals of planner.cost.stages, in logarithms"
    )

    @model_validator(mode="after")
    def _fits(self) -> PlanTimes:
        compute = [(part, KERNEL_LOADS) for part in (self.forward_compute, self.backward_compute)]
        comm = [(part, LINK_LOADS) for part in (self.forward_comm, self.backward_comm)]
        for part, loads in (*compute, *comm):
            if len(part) != len(loads) or part.min() < 0:
                raise ValueError(f"must be weights >= 0 of the {len(loads)} loads of this version")
        return self

    @property
    def kernels(self) -> Floats:
        """[2, loads]"""
        return np.stack([self.forward_compute, self.backward_compute])

    @property
    def links(self) -> Floats:
        """[2, loads]"""
        return np.stack([self.forward_comm, self.backward_comm])

    def compute(self, loads: PlanLoads) -> tuple[Floats, Floats, Floats]:
        """[ranks, 2]: forward and backward ms, and the ends of their intervals."""
        ms = np.einsum("rsl,sl->rs", loads.kernels, self.kernels)
        factor = np.exp(np.array(self.margins)[COMPUTE])
        return ms, ms / factor, ms * factor

    def links_ms(self, loads: PlanLoads) -> Floats:
        """[2]: forward and backward."""
        return np.asarray((loads.links * self.links).sum(axis=1))

    def compute_charges(self, kernel_ms: Floats, loads: ShardLoads) -> Floats:
        """[shards, 2]: what each adds to its rank, whose kernel takes `kernel_ms` [shards, 2] more
        for it."""
        fused = kernel_ms * self.kernels[:, _FUSED]
        replicated = np.stack(
            [kernel_ms, np.ones_like(kernel_ms), np.repeat(loads.table_bytes[:, None], 2, axis=1)]
        )
        every = np.einsum("lns,sl->ns", replicated, self.kernels[:, _OF_REPLICATED])
        return np.where(loads.replicated[:, None], every, fused)

    def link_charges(self, collectives_ms: Floats, loads: ShardLoads) -> Floats:
        """[shards, 2]: what each adds, whose collectives take `collectives_ms` [shards, 2] more."""
        weights = self.links
        own = collectives_ms * weights[:, _COLLECTIVES] + loads.links @ weights[:, _OF_SHARDS].T
        return np.where(loads.replicated[:, None], 0.0, own)


@dataclass(frozen=True)
class ShardLoads:
    """What each shard has of the loads that add up over the shards of a rank."""

    replicated: Bools  # [shards]
    table_bytes: Floats  # [shards]
    links: Floats  # [shards, LINK_LOADS[_OF_SHARDS]]; 0 where replicated

    @classmethod
    def of(cls, shards: ShardColumns, topology: Topology, batch_size: int) -> ShardLoads:
        work = ShardWork.of(shards, topology, batch_size)
        links = LinkBytes.of(shards, topology, batch_size)
        replicated = is_replicated(shards)
        ids = work.lookups * ID_BYTES
        each = [ids, ids * links.is_summed, work.bags * links.is_summed, links.embeddings]
        return cls(
            replicated=replicated,
            table_bytes=work.rows * work.columns * work.element_bytes,
            links=np.stack(each, axis=1) * ~replicated[:, None],
        )


@dataclass(frozen=True)
class PlanLoads:
    """What the stages of a plan grow with."""

    kernels: Floats  # [ranks, 2, KERNEL_LOADS]: forward and backward
    links: Floats  # [2, LINK_LOADS]

    @classmethod
    def of(
        cls,
        shards: ShardColumns,
        rank: Ints,
        topology: Topology,
        batch_size: int,
        kernel_ms: KernelMs,
        times: Times,
    ) -> PlanLoads:
        """`shards` are those of the plan, each on its `rank`."""
        ranks = topology.world_size
        own = ShardLoads.of(shards, topology, batch_size)
        replicated = own.replicated
        types = np.unique(shards.sharding_type[~replicated])
        kernels = np.zeros((ranks, 2, len(KERNEL_LOADS)))
        kernels[:, :, 0] = 1
        for code in types:
            chosen = shards.sharding_type == code
            kernels[:, :, 1] += (np.bincount(rank[chosen], minlength=ranks) > 0)[:, None]
            kernels[:, :, _FUSED] += kernel_ms(chosen)
        if replicated.any():
            tables = np.bincount(rank[replicated], minlength=ranks)
            size = np.bincount(rank[replicated], own.table_bytes[replicated], minlength=ranks)
            kernels[:, :, _REPLICATED] = np.stack(
                [
                    np.ones((ranks, 2)),
                    kernel_ms(replicated),
                    np.repeat(tables[:, None], 2, axis=1),
                    np.repeat(size[:, None], 2, axis=1),
                ],
                axis=2,
            )
        return cls(kernels, cls._links(shards, rank, topology, batch_size, own, times))

    @staticmethod
    def _links(
        shards: ShardColumns,
        rank: Ints,
        topology: Topology,
        batch_size: int,
        own: ShardLoads,
        times: Times,
    ) -> Floats:
        sent = ~own.replicated
        types = np.unique(shards.sharding_type[sent])
        features = shards.tables.num_features.sum()
        width = (shards.tables.num_features * shards.tables.embedding_dim).sum()
        collectives = np.zeros(2)
        if times and sent.any():
            links = LinkBytes.of(shards.select(sent), topology, batch_size)
            collectives = links.stage_ms(times, rank[sent][None])[0]
        busiest = sum_by(own.links, rank, topology.world_size).max(axis=0)
        same = [1.0, len(types), features]
        bytes_out = float(batch_size * width * OUTPUT_BYTES)
        return np.stack([np.array([*same, ms, *busiest, bytes_out]) for ms in collectives])


def is_replicated(shards: ShardColumns) -> Bools:
    return np.asarray(shards.sharding_type == TYPE_CODE["data_parallel"])
