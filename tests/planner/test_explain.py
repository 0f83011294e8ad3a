"""Why a table is sharded as it is: held to plans that are made in full with each other option."""

from __future__ import annotations

from itertools import combinations

import pytest

from planner import Plan, PlannerError, RequestError, Shard, ShardingRule, TablePlan, plan_by_rule
from planner.constraints import TableConstraint
from planner.cost.analytic import AnalyticCost
from planner.cost.predict import predict
from planner.explain import Option, explain_table
from planner.geometry import cut
from planner.make_plan import make_plan
from planner.tables import TableSpec
from planner.topology import Topology, parse_topology

from .commands import MALFORMED, TABLES, Bench
from .example_plans import without_costs

BATCH = 1024
MODEL = AnalyticCost(BATCH)
FOUR = parse_topology("1x4xA100-80GB")


def specs() -> list[TableSpec]:
    return [TableSpec.model_validate(table) for table in TABLES]


def planned(topology: Topology = FOUR, **settings: object) -> Plan:
    return make_plan(specs(), topology, MODEL, BATCH, **settings)  # type: ignore[arg-type]


def with_option(plan: Plan, name: str, option: Option, ranks: tuple[int, ...]) -> Plan:
    """`plan` with the table's shards on these ranks, predicted anew."""
    spec = plan.tables[name].spec
    assert spec is not None
    blocks = cut(spec, option.sharding_type, plan.topology, option.column_shards)  # type: ignore[arg-type]
    shards = [
        Shard(rank=rank, memory_bytes=0, **block._asdict())
        for rank, block in zip(ranks, blocks, strict=True)
    ]
    table = TablePlan(
        sharding_type=option.sharding_type,  # type: ignore[arg-type]
        compute_kernel=option.compute_kernel,  # type: ignore[arg-type]
        cache_load_factor=option.cache_load_factor,
        shards=tuple(shards),
        spec=spec,
    )
    changed = plan.model_copy(update={"tables": {**plan.tables, name: table}})
    return predict(changed, MODEL, BATCH, plan.objective or "stages")


@pytest.mark.parametrize("objective", ["stages", "max_total"])
@pytest.mark.parametrize("name", [table["name"] for table in TABLES])
def test_the_step_with_each_other_option(name: str, objective: str) -> None:
    """It is that of the best of all plans with this option and all other tables as they are."""
    plan = planned(objective=objective)
    chosen, *others = explain_table(plan, name).options
    assert chosen.is_chosen and chosen.step_ms == plan.predicted.step_ms
    assert others
    for option in others:
        made = [
            with_option(plan, name, option, ranks).predicted.step_ms
            for ranks in combinations(range(4), option.devices)
        ]
        best = min(ms for ms in made if ms is not None)
        assert option.step_ms is not None
        # Places are chosen by a norm that is nearly the maximum.
        assert best * (1 - 1e-9) <= option.step_ms <= best * 1.02


def test_options_are_ordered_by_the_step() -> None:
    """The chosen option is first, then the next best; the search left nothing on the table."""
    steps = [option.step_ms for option in explain_table(planned(), "items").options]
    assert steps[1:] == sorted(steps[1:])  # type: ignore[type-var]
    assert steps[0] <= steps[1] * (1 + 1e-9)  # type: ignore[operator]


def test_the_numbers_of_the_chosen_option_are_the_plan_s() -> None:
    """Work, largest piece and memory are those of the table's shards."""
    plan = planned()
    chosen = explain_table(plan, "items").options[0]
    shards = plan.tables["items"].shards
    costs = [shard.cost_ms for shard in shards if shard.cost_ms is not None]
    assert chosen.work_ms == pytest.approx(sum(costs))
    assert chosen.largest_ms == pytest.approx(max(costs))
    assert chosen.memory_bytes >= max(shard.memory_bytes for shard in shards)
    assert chosen.devices == len(shards)


def test_an_option_that_does_not_fit() -> None:
    """It is last, and has no step."""
    hardware = FOUR.hardware
    assert hardware is not None
    small = hardware.model_copy(update={"device_memory_bytes": 700 * 2**20, "host_memory_bytes": 0})
    plan = planned(FOUR.model_copy(update={"hardware": small}))
    options = explain_table(plan, "users").options
    whole = next(option for option in options if option.sharding_type == "data_parallel")
    assert whole.step_ms is None
    assert options[-1].step_ms is None and options[0].step_ms is not None


def test_constraints_leave_out_options() -> None:
    """Only what the constraint admits is compared, and the constraint is told."""
    constraint = TableConstraint(sharding_types=("row_wise", "table_wise"), ranks=(0, 1, 2, 3))
    plan = planned(constraints={"users": constraint})
    explanation = explain_table(plan, "users")
    assert explanation.constraint == constraint
    assert {o.sharding_type for o in explanation.options} == {"row_wise", "table_wise"}


def test_a_group_is_explained_as_one() -> None:
    """Tables that are kept together move together."""
    plan = planned(constraints={n: TableConstraint(group="g") for n in ("users", "words")})
    alone, together = explain_table(plan, "users"), explain_table(plan, "words")
    assert alone.together_with == ("words",) and together.together_with == ("users",)
    assert [o.step_ms for o in alone.options] == [o.step_ms for o in together.options]
    work = sum(s.cost_ms or 0.0 for n in ("users", "words") for s in plan.tables[n].shards)
    assert alone.options[0].work_ms == pytest.approx(work)


def test_a_plan_by_rule() -> None:
    """What no search would choose is explained too: the chosen option is the plan's."""
    rule = ShardingRule(sharding_type="column_wise", column_shards=1)
    plan = predict(plan_by_rule(specs(), FOUR, rule), MODEL, BATCH)
    chosen, best = explain_table(plan, "items").options[:2]
    assert (chosen.sharding_type, chosen.column_shards) == ("column_wise", 1)
    assert chosen.step_ms == plan.predicted.step_ms
    assert best.step_ms is not None and best.step_ms < plan.predicted.step_ms  # type: ignore[operator]


def test_a_plan_without_costs() -> None:
    """There is nothing to compare; how to get costs is told."""
    with pytest.raises(PlannerError, match="no predicted costs"):
        explain_table(without_costs(), "a")


def test_an_unknown_table() -> None:
    """The nearest name is told."""
    with pytest.raises(RequestError, match=r"the plan has no table item; did you mean items\?"):
        explain_table(planned(), "item")


def test_the_command(bench: Bench) -> None:
    """People read the reason and the next best; programs get all options."""
    bench.write("pins.yaml", "users: {sharding_types: [row_wise]}\n")
    bench.plan(
        *("tables.json", "--topology", "2x2xH100", "--constraints", "pins.yaml"),
        *("--out", "plan.json"),
    )
    shown = bench.plan("explain", "plan.json", "items").out
    assert shown.startswith("items: 500,000 x 64 fp32") and "The next best, " in shown
    assert "fixed by constraint: sharding_types row_wise" in bench.plan(
        "explain", "plan.json", "users"
    ).out  # fmt: skip
    document = bench.made("explain", "plan.json", "items")
    assert document["options"][0]["is_chosen"] and document["spec"]["num_embeddings"] == 500_000
    ended = bench.plan("explain", "plan.json", "itms")
    assert "did you mean items?" in ended.err and ended.code == MALFORMED
