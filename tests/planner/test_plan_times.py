"""What a plan's stages take around kernels and collectives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from planner import Plan, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.cost import fit
from planner.cost.calibrate import FEWEST_PLANS, fit_all_plans, fit_profile
from planner.cost.fit_plans import fit_plans, loads_of
from planner.cost.learned import LearnedCost
from planner.cost.measurements import PlanSample
from planner.cost.plan_times import KERNEL_LOADS, LINK_LOADS, PlanTimes
from planner.cost.predict import shards_of, table_specs
from planner.cost.profile import Profile
from planner.cost.stages import COMPUTE, LINKS
from planner.geometry import ShardingType
from planner.hardware import preset
from planner.learned_plan import make_learned_plan
from planner.make_plan import make_plan
from shardemb.profiler.workloads import draw_plan

from .measured import measurements

ON_TWO = Topology(world_size=2, local_world_size=2, hardware=preset("cpu"))
KERNELS = dict.fromkeys(KERNEL_LOADS, 0.0) | {"fixed": 0.05, "fused_ms": 0.9, "replicated_ms": 1.5}
LINKS_ = dict.fromkeys(LINK_LOADS, 0.0) | {"fixed": 0.1, "exchanges": 2.0, "id_bytes": 1e-6}


def plan_times(exchange_ms: float = 2.0) -> PlanTimes:
    links = np.array(list((LINKS_ | {"exchanges": exchange_ms}).values()))
    kernels = np.array(list(KERNELS.values()))
    return PlanTimes(
        world_size=2,
        measured=50,
        forward_compute=kernels,
        backward_compute=kernels * 2,
        forward_comm=links,
        backward_comm=links / 2,
        margins=(0.1,) * 4,
    )


@pytest.fixture(scope="module")
def profile() -> Profile:
    short = {"MEMBERS": 2, "STEPS": (300, 300), "HEAD_STEPS": 300, "DREAMSHARD_STEPS": 10}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in short.items():
            patch.setattr(fit, name, value)
        return fit_profile(measurements(sets=160))


def with_plans(profile: Profile, times: PlanTimes) -> Profile:
    return profile.model_copy(update={"plans": (times,)})


def rule(kind: ShardingType, *ranks: int) -> ShardingRule:
    return ShardingRule(sharding_type=kind, ranks=ranks or None)


def test_loads_of_a_plan(profile: Profile) -> None:
    """Counted by hand: 4 rows a rank, so 8 bags of each feature; 8 bytes an id."""
    tables = [
        TableSpec(name="whole", num_embeddings=100, embedding_dim=8, pooling_factor=3),
        TableSpec(name="cut", num_embeddings=100, embedding_dim=4, pooling_factor=2),
        TableSpec(name="copied", num_embeddings=50, embedding_dim=4),
    ]
    rules = {"cut": rule("row_wise"), "copied": rule("data_parallel")}
    plan = plan_by_rule(tables, ON_TWO, rule("table_wise", 1), rules)
    sample = PlanSample(plan.model_copy(update={"batch_size": 4}), np.ones((2, 4)))
    loads = loads_of(sample, profile)
    forward = dict(zip(LINK_LOADS, loads.links[0], strict=True))
    assert (forward["fixed"], forward["exchanges"], forward["features"]) == (1, 2, 3)
    assert forward["id_bytes"] == 8 * 3 * 8 + 8 * 2 * 8 / 2  # rank 1: all of whole, half of cut
    assert forward["row_id_bytes"] == 8 * 2 * 8 / 2
    assert forward["row_bags"] == 8
    assert forward["sent_bytes"] == 8 * 8 * 4 + 8 * 4 * 4  # each for all bags, in fp32
    assert forward["output_bytes"] == 4 * (8 + 4 + 4) * 4
    kernels = [dict(zip(KERNEL_LOADS, each, strict=True)) for each in loads.kernels[:, 0]]
    assert [each["kernels"] for each in kernels] == [1, 2]  # rank 0 has no whole table
    assert [each["replicated_tables"] for each in kernels] == [1, 1]
    assert [each["replicated_bytes"] for each in kernels] == [50 * 4 * 4] * 2
    assert 0 < kernels[0]["fused_ms"] < kernels[1]["fused_ms"]


def samples(profile: Profile, count: int, noise: float = 0.0) -> list[PlanSample]:
    """Plans that take what `plan_times` says."""
    generator, times, found = np.random.default_rng(0), plan_times(), []
    for number in range(count):
        plan = draw_plan(3, number, 2, "cpu")
        sample = PlanSample(plan, np.ones((2, 4)))
        loads = loads_of(sample, profile)
        stages = np.zeros((2, 4))
        stages[:, COMPUTE], stages[:, LINKS] = times.compute(loads)[0], times.links_ms(loads)
        scatter = np.exp(noise * generator.standard_normal(stages.shape))
        found.append(dataclasses.replace(sample, stages=stages * scatter))
    return found


def test_a_fit_finds_the_weights(profile: Profile) -> None:
    """Of 60 plans that follow them; also where times scatter by 5%, and one is a hundredfold."""
    exact = fit_plans(samples(profile, 60), profile)
    assert exact.kernels == pytest.approx(plan_times().kernels, rel=0.02, abs=1e-3)
    assert exact.links == pytest.approx(plan_times().links, rel=0.02, abs=1e-3)
    assert max(exact.margins) < 0.02
    noisy = samples(profile, 60, noise=0.05)
    noisy[7] = dataclasses.replace(noisy[7], stages=noisy[7].stages * 100)
    fitted = fit_plans(noisy, profile)
    for sample in samples(profile, 5):
        loads = loads_of(sample, profile)
        assert fitted.compute(loads)[0] == pytest.approx(sample.stages[:, COMPUTE], rel=0.15)
        assert fitted.links_ms(loads) == pytest.approx(sample.stages[0, LINKS], rel=0.15)


def test_too_few_plans_are_left_alone(profile: Profile) -> None:
    """Another number of ranks of which there are enough is fitted."""
    assert fit_all_plans(samples(profile, FEWEST_PLANS - 1), profile) == ()
    enough = samples(profile, FEWEST_PLANS)
    on_four = draw_plan(0, 0, 4, "cpu")
    one = PlanSample(on_four, np.ones((4, 4)))
    assert [times.world_size for times in fit_all_plans([*enough, one], profile)] == [2]


@pytest.mark.parametrize("number", range(12))
def test_sums_over_shards_are_never_more_than_the_prediction(profile: Profile, number: int) -> None:
    """Of compute: so the planner's bound holds for it."""
    plan = draw_plan(5, number, 2, "cpu").model_copy(update={"topology": ON_TWO})
    assert plan.batch_size
    model = LearnedCost(with_plans(profile, plan_times()), plan.batch_size)
    shards, rank = shards_of(plan, table_specs(plan))
    costs = model.stage_costs(shards, ON_TWO)[:, COMPUTE]
    sums = np.array([costs[rank == r].sum(axis=0) for r in (0, 1)])
    estimate = model.estimate(plan)
    assert (sums > 0).any() and (sums <= estimate.compute.ms * (1 + 1e-9)).all()
    assert (estimate.compute.low < estimate.compute.high).all()


def tables() -> list[TableSpec]:
    """Some that are best cut, and many small ones that are not."""
    large = [
        TableSpec(name=f"large{i}", num_embeddings=10**6, embedding_dim=64, pooling_factor=30)
        for i in range(3)
    ]
    return large + [TableSpec(name=f"s{i}", num_embeddings=900, embedding_dim=16) for i in range(6)]


def used(plan: Plan) -> set[str]:
    return {table.sharding_type for table in plan.tables.values()}


def test_plans_use_fewer_types_where_each_costs_much(profile: Profile) -> None:
    """No sum over shards knows of it, so the search itself does not."""
    dear = LearnedCost(with_plans(profile, plan_times(exchange_ms=50.0)), 256)
    searched = make_plan(tables(), ON_TWO, dear, 256)
    assert len(used(searched) - {"data_parallel"}) > 1
    chosen = make_learned_plan(tables(), ON_TWO, dear, 256)
    assert len(used(chosen) - {"data_parallel"}) == 1
    assert dear.estimate(chosen).step_ms < dear.estimate(searched).step_ms - 50
    assert chosen.predicted.bound_ms == searched.predicted.bound_ms
    assert all(table.constraint is None for table in chosen.tables.values())
