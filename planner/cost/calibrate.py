"""From measurements to a profile: networks and collectives fitted, intervals from held-out data.

Intervals are split-conformal (Lei et al., Distribution-free predictive inference for regression,
2018): the quantile of the log errors on tasks, or collectives, that the fit has not seen. They hold
for work like that which was measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from planner.cost.communication import CollectiveTimes, rank_loads
from planner.cost.features import ShardWork, dreamshard_features, whole_tables
from planner.cost.fit import Sets, fit_convex_head, fit_dreamshard, fit_ensemble
from planner.cost.fit_plans import fit_plans
from planner.cost.measurements import (
    COLLECTIVES,
    CollectiveSample,
    KernelSample,
    Measurements,
    PlanSample,
)
from planner.cost.networks import DreamShardNetwork
from planner.cost.plan_times import PlanTimes
from planner.cost.profile import COVERAGE, ComputeTimes, Profile
from planner.errors import PlannerError
from planner.shards import Bools, Floats, TableColumns
from planner.storage import OUTPUT_BYTES
from planner.tables import TableSpec

FEWEST_SETS, FEWEST_CALLS = 24, 5  # of tables, and of each collective
FEWEST_PLANS = 12  # on one number of ranks; of fewer nothing is fitted
HELD_OUT = 0.15  # share of the tasks, and of the collectives, that intervals are taken from


def fit_profile(measurements: Measurements, seed: int = 0) -> Profile:
    """The same measurements and seed give the same profile. Of collectives those over the most
    ranks are taken.

    PlannerError where there are too few measurements of a kind, with how many are missing.
    """
    ranks = max((len(call.sent_bytes) for call in measurements.collectives), default=0)
    calls = [call for call in measurements.collectives if len(call.sent_bytes) == ranks]
    _check_enough(measurements.kernels, calls)
    communication = {
        kind: fit_collective([call for call in calls if call.kind == kind], seed)
        for kind in COLLECTIVES
        if calls
    }
    profile = Profile(
        environment=measurements.environment,
        seed=seed,
        compute=fit_compute(measurements.kernels, seed),
        communication=communication,
        dreamshard=fit_published(measurements.kernels, communication.get("all_to_all"), seed),
    )
    return profile.model_copy(update={"plans": fit_all_plans(measurements.plans, profile)})


def fit_all_plans(plans: Sequence[PlanSample], profile: Profile) -> tuple[PlanTimes, ...]:
    """For each number of ranks that enough plans were run on."""
    by_ranks: defaultdict[int, list[PlanSample]] = defaultdict(list)
    for sample in plans:
        by_ranks[sample.plan.topology.world_size].append(sample)
    return tuple(
        fit_plans(samples, profile)
        for _, samples in sorted(by_ranks.items())
        if len(samples) >= FEWEST_PLANS
    )


def _check_enough(kernels: Sequence[KernelSample], calls: Sequence[CollectiveSample]) -> None:
    found = {"sets of tables": (len(kernels), FEWEST_SETS)}
    for kind in COLLECTIVES if calls else ():
        found[f"{kind} collectives"] = (sum(c.kind == kind for c in calls), FEWEST_CALLS)
    lines = [
        f"  {what}: {count} of at least {fewest}, {fewest - count} are missing"
        for what, (count, fewest) in found.items()
        if count < fewest
    ]
    if lines:
        raise PlannerError(
            "\n".join(["there are too few measurements to fit a profile:", *lines])
            + "\nmeasure longer: what is there is kept"
        )


def fit_compute(samples: Sequence[KernelSample], seed: int) -> ComputeTimes:
    """Forward and backward of fused kernels."""
    held_out = _held_out([sample.task for sample in samples], seed)
    fitted = [s for s, held in zip(samples, held_out, strict=True) if not held]
    sets = sets_of(fitted)
    network = fit_ensemble(sets, seed)
    others = sets_of([s for s, held in zip(samples, held_out, strict=True) if held])
    compute = ComputeTimes(
        network=network,
        margins=(0.0, 0.0),
        lowest=sets.features.min(axis=0),
        highest=sets.features.max(axis=0),
        measured=len(samples),
    )
    predicted = network.stage_ms(_sums(compute, others))
    forward, backward = (
        _quantile(np.abs(np.log(predicted[:, stage] / others.times[:, stage]))) for stage in (0, 1)
    )
    return compute.model_copy(update={"margins": (forward, backward)})


def _sums(compute: ComputeTimes, sets: Sets) -> Floats:
    starts = np.cumsum(sets.counts) - sets.counts
    return np.add.reduceat(compute.network.represent(sets.features), starts, axis=0)


def fit_collective(samples: Sequence[CollectiveSample], seed: int) -> CollectiveTimes:
    """One kind of collective; all samples are of one number of ranks."""
    kind, world_size = samples[0].kind, len(samples[0].sent_bytes)
    loads = rank_loads(kind, np.array([s.sent_bytes for s in samples], dtype=np.float64))
    times = np.array([s.ms for s in samples])
    held = _held_out(range(len(samples)), seed)
    head = fit_convex_head(loads[~held], times[~held], seed)
    margin = _quantile(np.abs(np.log(head.largest(loads[held]) / times[held])))
    return CollectiveTimes(head=head, margin=margin, world_size=world_size, measured=len(samples))


def fit_published(
    samples: Sequence[KernelSample], all_to_all: CollectiveTimes | None, seed: int
) -> DreamShardNetwork:
    """DreamShard's network, to the plans that the tasks' devices make.

    Devices are measured one after the other: what a plan's embeddings take from rank to rank is
    what `all_to_all` predicts (nothing without it), a step the sum of its slowest stages.
    """
    tasks = np.array([sample.task for sample in samples])
    times, plans, steps = np.zeros((len(samples), 3)), [], []
    features: list[Floats] = [np.zeros((0, 0))] * len(samples)
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task).tolist()
        own = [samples[i] for i in members]
        cuts = np.cumsum([len(sample.tables) for sample in own])[:-1]
        tables = [table for sample in own for table in sample.tables]
        for i, part in zip(members, np.split(published_features(tables), cuts), strict=True):
            features[i] = part
        kernels = np.array([(sample.forward_ms, sample.backward_ms) for sample in own])
        exchange = _exchange_ms(own, all_to_all)
        times[members] = np.column_stack([kernels, np.full(len(own), exchange)])
        plans.append(members)
        steps.append(kernels.max(axis=0).sum() + 2 * exchange)
    counts = np.array([len(sample.tables) for sample in samples])
    sets = Sets(np.concatenate(features), counts, times)
    most = max(len(plan) for plan in plans)
    whole = [i for i, plan in enumerate(plans) if len(plan) == most]
    return fit_dreamshard(sets, np.stack([plans[i] for i in whole]), np.array(steps)[whole], seed)


def published_features(tables: Sequence[TableSpec]) -> Floats:
    """DreamShard's, of all tables of a task."""
    return dreamshard_features(whole_tables(TableColumns.of(tables)))


def _exchange_ms(devices: Sequence[KernelSample], all_to_all: CollectiveTimes | None) -> float:
    """Pooled embeddings from every device to every other."""
    if all_to_all is None:
        return 0.0
    widths = [sum(table.embedding_dim for table in device.tables) for device in devices]
    rows = devices[0].batch_size / len(devices)
    sent = np.array([widths], dtype=np.float64) * rows * OUTPUT_BYTES
    return float(all_to_all.ms(rank_loads("all_to_all", sent))[0])


def sets_of(samples: Sequence[KernelSample]) -> Sets:
    """With our features."""
    features = [ShardWork.of_tables(s.tables, s.batch_size).features for s in samples]
    return Sets(
        features=np.concatenate(features),
        counts=np.array([len(sample.tables) for sample in samples], dtype=np.int64),
        times=np.array([(s.forward_ms, s.backward_ms) for s in samples]),
    )


def _held_out(groups: Sequence[int], seed: int) -> Bools:
    """Which samples are of the groups that are kept for the intervals: one at least."""
    found = np.unique(np.array(groups))
    count = max(1, round(HELD_OUT * len(found)))
    kept = np.random.default_rng(seed).permutation(found)[:count]
    return np.isin(np.array(groups), kept)


def _quantile(errors: Floats) -> float:
    """The conformal one: of n errors the ceil((n + 1) COVERAGE)-th, or the largest."""
    rank = min(math.ceil((len(errors) + 1) * COVERAGE), len(errors))
    return float(np.sort(errors)[rank - 1])
