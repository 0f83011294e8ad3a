"""Costs from a profile: what kernels and collectives took where it was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.cost.analytic import AnalyticCost
from planner.cost.features import ShardWork, sum_by, whole_tables
from planner.cost.links import LinkBytes
from planner.cost.plan_times import PlanLoads, PlanTimes, ShardLoads, is_replicated
from planner.cost.predict import shards_of, table_specs
from planner.cost.profile import Estimate, Profile
from planner.cost.stages import COMPUTE, LINKS
from planner.plan import Plan
from planner.shards import KERNEL_CODE, Bools, Floats, Ints, ShardColumns
from planner.topology import Topology


@dataclass(frozen=True)
class PlanEstimate:
    """What a profile predicts for a plan."""

    compute: Estimate  # [ranks, 2]: forward and backward
    links_ms: Floats  # [2]: the collectives of forward and of backward
    extrapolated: float  # times beyond what was measured, of the shard that is farthest; 1: none

    @property
    def step_ms(self) -> float:
        """Every stage waits for its slowest rank."""
        return float(self.compute.ms.max(axis=0).sum() + self.links_ms.sum())


@dataclass(frozen=True)
class LearnedCost:
    """What each shard adds to the stages of its device: additive, as search and bound need it.

    A fused kernel costs less than its tables one by one, so the profile's prediction for a device
    is not a sum over its shards. `stage_costs` is its tangent, where every device has an even part
    of all tables. What follows of the prediction's heads, which are convex and rise:

    - Compute: no device is predicted to take less than the tangent says, so a plan's predicted
      compute is at least its sums. The tangent leaves out what a kernel takes before its first row.
    - Communication: a byte that a rank sends is charged what a byte costs where all ranks send as
      much: about right for even plans, too much for uneven ones.

    The planner's bound certifies the sums of these costs. So it also holds for a step of predicted
    compute (of fused kernels) and communication as charged here; it certifies nothing about
    communication as `estimate` predicts it.

    Measured are fused kernels for pooled, unweighted tables in device memory, and collectives in
    one host. Other kernels cost what the analytic model says, times what fused kernels take here
    for each ms that it says of them; between hosts collectives are the analytic model's.

    Where whole plans were run too, kernels, collectives and what is around them are weighted as
    PlanTimes of the nearest number of ranks says. The weights are not negative, so all this stays
    true; what a sharding type takes however few shards it has is in `estimate` alone.
    """

    profile: Profile
    batch_size: int
    name: str = "profile"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        """[shards, 4]: milliseconds of each stage, above what a device takes at least."""
        costs = AnalyticCost(self.batch_size).stage_costs(shards, topology)
        whole = whole_tables(shards.tables)
        added = self._represent(whole, topology)
        slopes = self.profile.compute.network.slopes(added.sum(axis=0) / topology.world_size)
        analytic = AnalyticCost(self.batch_size).stage_costs(whole, topology)[:, COMPUTE]
        costs[:, COMPUTE] *= (added @ slopes.T).sum(axis=0) / analytic.sum(axis=0)
        times, loads = self._times(topology), ShardLoads.of(shards, topology, self.batch_size)
        measured = self._is_measured(shards, topology)
        kernel_ms = np.zeros((len(shards), 2))
        kernel_ms[measured] = self._represent(shards.select(measured), topology) @ slopes.T
        own = times.compute_charges(kernel_ms, loads) if times else kernel_ms
        costs[:, COMPUTE] = np.where(measured[:, None], own, costs[:, COMPUTE])
        if self._knows_links(topology):
            links = LinkBytes.of(shards, topology, self.batch_size)
            charges = links.charges(self.profile.communication)
            costs[:, LINKS] = times.link_charges(charges, loads) if times else charges
        return costs

    def estimate(self, plan: Plan) -> PlanEstimate:
        """What the profile predicts for `plan`: each rank's kernels whole, collectives by rank."""
        topology, ranks = plan.topology, plan.topology.world_size
        shards, rank = shards_of(plan, table_specs(plan))
        additive, times = self.stage_costs(shards, topology), self._times(topology)
        measured = self._is_measured(shards, topology)
        work = ShardWork.of(shards.select(measured), topology, self.batch_size)
        others = sum_by(additive[~measured][:, COMPUTE], rank[~measured], ranks)
        links_ms = self.links_ms(shards, additive, topology, rank[None])[0]
        if times:
            loads = self.plan_loads(shards, rank, topology)
            compute = times.compute(loads)
            if self._knows_links(topology):
                links_ms = times.links_ms(loads)
        else:
            compute = self.profile.compute.estimate(work, rank[measured], ranks)
        return PlanEstimate(
            compute=Estimate(*(part + others for part in compute)),
            links_ms=links_ms,
            extrapolated=float(self.profile.compute.extrapolated(work).max(initial=1.0)),
        )

    def links_ms(
        self, shards: ShardColumns, additive: Floats, topology: Topology, ranks: Ints
    ) -> Floats:
        """[plans, 2]: the collectives of plans that have each shard on a rank, `ranks` [plans,
        shards]; `additive` is what `stage_costs` says of the shards. Without what all plans of the
        same sharding types have alike."""
        if self._knows_links(topology) and self._times(topology) is None:
            links = LinkBytes.of(shards, topology, self.batch_size)
            return links.stage_ms(self.profile.communication, ranks)
        sums = [sum_by(additive[:, LINKS], rank, topology.world_size) for rank in ranks]
        return np.asarray(np.max(sums, axis=1))

    def plan_loads(self, shards: ShardColumns, rank: Ints, topology: Topology) -> PlanLoads:
        """What `profile.plans` weighs, of a plan that has each shard on its `rank`."""
        measured = is_measured(shards) | is_replicated(shards)

        def kernel_ms(chosen: Bools) -> Floats:
            own = chosen & measured
            work = ShardWork.of(shards.select(own), topology, self.batch_size)
            return self.profile.compute.estimate(work, rank[own], topology.world_size).ms

        return PlanLoads.of(
            shards, rank, topology, self.batch_size, kernel_ms, self.profile.communication
        )

    def _represent(self, shards: ShardColumns, topology: Topology) -> Floats:
        work = ShardWork.of(shards, topology, self.batch_size)
        return self.profile.compute.network.represent(work.features)

    def _times(self, topology: Topology) -> PlanTimes | None:
        """Of the nearest number of ranks that plans were run on."""
        ranks = math.log(topology.world_size)
        plans = self.profile.plans
        return min(plans, key=lambda times: abs(math.log(times.world_size) - ranks), default=None)

    def _is_measured(self, shards: ShardColumns, topology: Topology) -> Bools:
        measured = is_measured(shards)
        return measured | is_replicated(shards) if self._times(topology) else measured

    def _knows_links(self, topology: Topology) -> bool:
        return topology.num_hosts == 1 and bool(self.profile.communication)


def is_measured(shards: ShardColumns) -> Bools:
    """Which shards run in kernels of the kind that profiles measure."""
    return np.asarray(
        (shards.compute_kernel == KERNEL_CODE["fused"])
        & shards.of_table("pooled")
        & ~shards.of_table("weighted")
    )
