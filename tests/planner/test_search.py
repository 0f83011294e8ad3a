"""The bound is below every plan, and the search finds plans close to the best there is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from planner.constraints import TableConstraint
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.options import make_problem
from planner.search.bound import lower_bound
from planner.search.objective import Goal
from planner.search.optimize import search
from planner.search.relaxation import Relaxation
from planner.tables import TableSpec
from planner.topology import parse_topology
from tests.planner.brute_force import best_objective, small_problems


@pytest.mark.parametrize("objective", ["stages", "max_total"])
@pytest.mark.parametrize("count", [160, pytest.param(2000, marks=pytest.mark.slow)])
def test_small_problems_against_all_their_plans(objective: str, count: int) -> None:
    """On random problems with tight and loose memory: no bound above the best plan, no plan below
    it, no problem given up that has a plan; and nearly always the best plan is found."""
    excess = []
    for problem in small_problems(count):
        best = best_objective(problem, objective)
        relaxation = Relaxation(Goal(problem, objective))
        placement = search(relaxation, seed=0)
        if placement is None:
            assert best == np.inf
            continue
        assert placement.fits
        assert placement.objective >= best * (1 - 1e-9)
        assert lower_bound(relaxation, placement.objective) <= best * (1 + 1e-9)
        assert lower_bound(relaxation, best) <= best * (1 + 1e-9)
        excess.append(placement.objective / best - 1)
    assert len(excess) > count / 2
    assert np.mean(excess) < 0.01
    assert np.mean(np.array(excess) < 1e-9) > 0.95


@pytest.mark.parametrize("objective", ["stages", "max_total"])
def test_any_prices_give_a_bound(objective: str) -> None:
    """The bound needs no trust in the solver: prices out of thin air stay below the best plan."""
    generator = np.random.default_rng(0)
    for problem in small_problems(80):
        best = best_objective(problem, objective)
        goal = Goal(problem, objective)
        if best == np.inf:
            continue
        relaxation = Relaxation(goal)
        floors = np.zeros(len(goal.groups))
        for _ in range(20):
            load_price = generator.uniform(-0.5, 1.5, goal.load.shape[1])
            memory_price = generator.uniform(-1, 3, relaxation.mean_memory.shape[1])
            bound = relaxation.dual_value(goal.fits, floors, 1.0, load_price, memory_price)
            assert bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["stages", "max_total"])
def test_a_solver_that_gives_up_proves_nothing_false(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the solver finds no solution half of the time, the bound is lower, never wrong."""
    generator = np.random.default_rng(0)
    solve = Relaxation._solve_program

    def fail_often(self, *arguments):
        return solve(self, *arguments) if generator.random() < 0.5 else None

    monkeypatch.setattr(Relaxation, "_solve_program", fail_often)
    for problem in small_problems(120):
        best = best_objective(problem, objective)
        if best < np.inf:
            assert lower_bound(Relaxation(Goal(problem, objective)), best) <= best * (1 + 1e-9)


def test_tables_that_are_alike_share_variables() -> None:
    """Several of each kind, one of them under a constraint of its own: shares of whole tables, and
    the value of the program that has variables of its own for every table."""
    generator = np.random.default_rng(0)
    sizes = [(int(10 ** generator.uniform(4, 7)), int(generator.choice([16, 64]))) for _ in "abc"]
    tables = [
        TableSpec(name=f"t{i}", num_embeddings=n, embedding_dim=d, pooling_factor=5.0)
        for i, (n, d) in enumerate(sizes * 7)
    ]
    topology = parse_topology("2x4xtorchrec-80GB")
    only = {"t3": TableConstraint(sharding_types=("row_wise",))}
    goal = Goal(make_problem(tables, topology, TorchRecEstimate(512), 512, only), "stages")
    relaxation = Relaxation(goal)
    fractions = relaxation.solve(np.full(2, np.inf), np.zeros(2))
    assert fractions is not None
    assert len(np.unique(relaxation._alike)) == 4

    unit = goal.options.unit
    columns = goal.load.shape[1]
    above = np.hstack([relaxation.mean_load.T, -np.eye(columns)])
    each = np.hstack([unit == np.arange(21)[:, None], np.zeros((21, columns))])
    kinds = relaxation.mean_memory.shape[1]
    in_memory = np.hstack([relaxation.mean_memory.T, np.zeros((kinds, columns))])
    price = np.concatenate([np.zeros(len(unit)), np.ones(columns)])
    limits = np.concatenate([np.zeros(columns), np.ones(kinds)])
    plain = linprog(price, np.vstack([above, in_memory]), limits, each, np.ones(21))
    assert fractions.bound == pytest.approx(plain.fun, rel=1e-9)
    assert fractions.maxima.sum() == pytest.approx(plain.fun, rel=1e-9)
    of_unit = np.bincount(unit[fractions.chosen], fractions.share)
    assert of_unit == pytest.approx(np.ones(21))
    in_parts = (fractions.share > 1e-6) & (fractions.share < 1 - 1e-6)
    assert in_parts.sum() <= 2 * columns
    assert fractions.share[unit[fractions.chosen] == 3] == pytest.approx([1])
