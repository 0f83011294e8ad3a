"""Fits what a plan's stages take beyond kernels and collectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from planner.cost.learned import LearnedCost
from planner.cost.measurements import PlanSample
from planner.cost.plan_times import PlanLoads, PlanTimes
from planner.cost.predict import shards_of, table_specs
from planner.cost.profile import COVERAGE, Profile
from planner.cost.stages import COMPUTE, LINKS
from planner.shards import Floats, Ints

FOLDS = 5  # of the plans, for the intervals
ROUNDS = 20  # of least squares, each with other weights
LEAST_ERROR = 0.03  # relative errors below count by their square: about what repetitions scatter


def fit_plans(samples: Sequence[PlanSample], profile: Profile) -> PlanTimes:
    """To plans that were run on one number of ranks; `profile` has the kernels and collectives.

    Weights are non-negative least squares of relative errors, reweighted so that large errors
    count by their size (Holland and Welsch, Robust regression using iteratively reweighted
    least-squares, 1977).
    """
    loads = [loads_of(sample, profile) for sample in samples]
    ranks = samples[0].plan.topology.world_size
    of_rank = np.repeat(np.arange(len(samples)), ranks)
    kernels = np.concatenate([each.kernels for each in loads])
    links = np.stack([each.links for each in loads])
    compute = np.concatenate([sample.stages[:, COMPUTE] for sample in samples])
    exchanged = np.stack([sample.stages[:, LINKS].max(axis=0) for sample in samples])
    fitted = [_fit(kernels[:, s], compute[:, s], of_rank) for s in (0, 1)]
    fitted += [_fit(links[:, s], exchanged[:, s], np.arange(len(samples))) for s in (0, 1)]
    (forward, margin), (backward, margin_back), (sent, wait), (returned, wait_back) = fitted
    return PlanTimes(
        world_size=ranks,
        measured=len(samples),
        forward_compute=forward,
        backward_compute=backward,
        forward_comm=sent,
        backward_comm=returned,
        margins=(margin, wait, margin_back, wait_back),
    )


def loads_of(sample: PlanSample, profile: Profile) -> PlanLoads:
    """What the plan's stages grow with, as `profile` predicts its kernels and collectives."""
    assert sample.plan.batch_size is not None, "a plan that was run has a batch size"
    shards, rank = shards_of(sample.plan, table_specs(sample.plan))
    model = LearnedCost(profile, sample.plan.batch_size)
    return model.plan_loads(shards, rank, sample.plan.topology)


def _fit(loads: Floats, times: Floats, plan: Ints) -> tuple[Floats, float]:
    """Weights [loads], and the quantile of the log errors of plans that a fit has not seen."""
    errors = np.zeros(len(times))
    for fold in range(FOLDS):
        held = plan % FOLDS == fold
        predicted = loads[held] @ _weights(loads[~held], times[~held])
        errors[held] = np.abs(np.log(predicted / times[held]))
    return _weights(loads, times), float(np.quantile(errors, COVERAGE))


def _weights(loads: Floats, times: Floats) -> Floats:
    scale = np.maximum(loads.max(axis=0), 1e-12)
    relative = loads / scale / times[:, None]
    importance = np.ones(len(times))
    for _ in range(ROUNDS):
        weights, _ = nnls(relative * importance[:, None], importance)
        error = np.abs(relative @ weights - 1)
        importance = 1 / np.sqrt(np.maximum(error, LEAST_ERROR))
    return np.asarray(weights / scale)
