"""A plan as a command asks for it: names of files, kinds and methods in, a plan out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from planner.constraints import TableConstraint
from planner.cost.shipped import profile_path, shipped
from planner.cost.stages import CostModel
from planner.data_stats import with_statistics
from planner.errors import RequestError
from planner.plan import Objective, Plan
from planner.strict_yaml import read_yaml
from planner.table_list import TableList, load_table_list
from planner.topology import Topology, parse_topology
from planner.validation import explain, shorten

if TYPE_CHECKING:
    from planner.comparison import Comparison
    from planner.cost.learned import LearnedCost

COST_MODELS = ("analytic", "torchrec")
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
AUTO, DREAMSHARD = "auto", "dreamshard"
MOST_ROWS = 10**9  # on one rank: a typing mistake otherwise


@dataclass(frozen=True)
class PlanRequest:
    """The options of `plan` as they were given; None where they were not."""

    topology: str | None = None
    batch_size: int | None = None
    cost: str | None = None
    objective: str | None = None
    search: str | None = None
    seed: int | None = None
    time_budget: float | None = None
    constraints: Path | None = None
    dense_bytes: str | None = None
    data_stats: Path | None = None
    verify: bool = False  # the plan will be run here: it is to have predictions


@dataclass(frozen=True)
class Sources:
    """How the commands read the file they are given; `shardemb` gives them ways of its own."""

    read_tables: Callable[[Path, Sequence[str]], TableList]
    make_plan: Callable[[Path, Sequence[str], PlanRequest], Plan]
    verify: Callable[[Plan], Comparison] | None = None  # runs a plan here


def read_tables(path: Path, overrides: Sequence[str] = ()) -> TableList:
    """A table list; a file of another kind is told by what it is."""
    try:
        tables = load_table_list(path)
    except RequestError as error:
        raise RequestError(_other_kind(path) or str(error)) from error
    if overrides:
        raise RequestError(
            f"{shorten(overrides[0])}: {path} is a table list; only a run config takes KEY=VALUE"
        )
    return tables


def _other_kind(path: Path) -> str:
    document = read_document(path)
    if "fingerprint" in document:
        return f"{path} is a plan, not a table list; `plan show {path}` shows it"
    if isinstance(document.get("tables"), dict):
        return f"{path} is a run config, not a table list; `shardemb plan {path}` plans for it"
    return ""


def read_document(path: Path) -> dict[str, Any]:
    """The top keys of a JSON or YAML file; none where it cannot be read."""
    try:
        document = json.loads(path.read_text()) if _is_json(path) else read_yaml(path)
    except (OSError, ValueError, RecursionError, RequestError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def plan_tables(path: Path, overrides: Sequence[str], request: PlanRequest) -> Plan:
    """The plan for a table list."""
    tables = read_tables(path, overrides)
    if request.data_stats:
        found = with_statistics(tables.tables, request.data_stats)
        tables = tables.model_copy(update={"tables": found})
    if request.topology is None:
        raise RequestError(
            "name the devices to plan for: --topology HOSTSxDEVICESxKIND, for example "
            "1x8xA100-80GB, or a topology file"
        )
    return plan_list(tables, parse_topology(request.topology), request)


def plan_list(tables: TableList, topology: Topology, request: PlanRequest) -> Plan:
    """The plan that the search makes, or the policy or baseline that `request` names."""
    batch_size = batch_size_of(tables, topology, request.batch_size)
    model = cost_model(request.cost or COST_MODELS[0], batch_size)
    settings: dict[str, Any] = {
        "objective": choose("--objective", request.objective or "stages", OBJECTIVES),
        "constraints": read_constraints(request.constraints),
        "dense_bytes": parse_bytes("--dense-bytes", request.dense_bytes or "0"),
        "seed": request.seed or 0,
    }
    problem = (tables.tables, topology, model, batch_size)
    search = request.search or AUTO
    if search == AUTO:  # each is imported where it is needed: it takes as long as all else
        return planner_for(model)(*problem, time_budget=_time_budget(request), **settings)
    from planner.search.baselines import BASELINES, plan_by_baseline

    name = choose("--search", search, (AUTO, DREAMSHARD, *BASELINES))
    if request.time_budget is not None:
        raise RequestError(f"--time-budget is for --search {AUTO}: {name} takes no time")
    if name == DREAMSHARD:
        from planner.search.dreamshard import plan_by_policy

        return plan_by_policy(*problem, **settings)
    return plan_by_baseline(name, *problem, **settings)


def _time_budget(request: PlanRequest) -> float | None:
    seconds = request.time_budget
    if seconds is not None and not 0 <= seconds < math.inf:
        raise RequestError(f"--time-budget {seconds}: give a number of seconds")
    return seconds


def batch_size_of(tables: TableList, topology: Topology, given: int | None) -> int:
    """Rows a step on each rank: as given, or as the table list says."""
    size = given or _listed_batch_size(tables, topology.world_size)
    if size > MOST_ROWS:
        raise RequestError(f"a batch of {size:,} rows on each rank is more than {MOST_ROWS:,}")
    return size


def _listed_batch_size(tables: TableList, ranks: int) -> int:
    per_rank, together = tables.batch_size_per_rank, tables.batch_size_global
    if per_rank is not None and together not in (None, per_rank * ranks):
        raise RequestError(
            f"batch_size_per_rank {per_rank:,} on {ranks:,} devices is not batch_size "
            f"{together:,}, which counts the rows of all ranks: give --batch-size"
        )
    if per_rank is not None:
        return per_rank
    if together is None:
        raise RequestError(
            "the batch size is not known: give --batch-size (rows a step on each rank), or "
            "batch_size_per_rank in the table list"
        )
    if together % ranks:
        raise RequestError(
            f"batch_size {together:,}, of all ranks, cannot be divided by {ranks:,} devices: "
            "give --batch-size (rows a step on each rank)"
        )
    return together // ranks


def cost_model(name: str, batch_size: int, option: str = "--cost") -> CostModel:
    """The model of that name, or of that profile, imported when it is asked for."""
    if profile_path(name):
        return learned_cost(name, batch_size)
    if choose(option, name, (*COST_MODELS, *shipped(), "a profile (FILE.json)")) == "torchrec":
        from planner.cost.torchrec_estimate import TorchRecEstimate

        return TorchRecEstimate(batch_size)
    from planner.cost.analytic import AnalyticCost

    return AnalyticCost(batch_size)


def planner_for(model: CostModel) -> Callable[..., Plan]:
    """`make_plan`, or what a profile needs, with the same arguments."""
    if profile_path(model.name):
        from planner.learned_plan import make_learned_plan

        return make_learned_plan
    from planner.make_plan import make_plan

    return make_plan


def learned_cost(name: str, batch_size: int) -> LearnedCost:
    """The cost model of a profile: of a shipped one, or of that file."""
    from planner.cost.learned import LearnedCost
    from planner.cost.profile import Profile

    path = profile_path(name)
    assert path is not None, name
    return LearnedCost(Profile.load(path), batch_size, name)


def choose(option: str, given: str, choices: Iterable[Any]) -> Any:
    """`given`, which must be one of `choices`."""
    known = list(choices)
    if given not in known:
        listed = ", ".join(known[:-1]) + (" or " if len(known) > 1 else "") + known[-1]
        raise RequestError(f"{option} {shorten(given)}: choose {listed}")
    return given


def read_constraints(path: Path | None) -> dict[str, TableConstraint]:
    """`TABLE: {sharding_types: [...], ...}`; RequestError names each wrong table and key."""
    constraints, mistakes = {}, []
    for name, entry in (read_yaml(path, "constraints") if path else {}).items():
        try:
            constraints[name] = TableConstraint.model_validate(entry)
        except ValidationError as error:
            mistakes += [f"  {name}: {line}" for line in explain(error, TableConstraint)]
    if mistakes:
        raise RequestError("\n".join([f"{path} does not hold valid constraints:", *mistakes[:10]]))
    return constraints


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes, or a text such as 1.5GiB."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = -1
    if not 0 <= size < 2**63:
        raise RequestError(f"{option} {shorten(text)}: write a number of bytes, or 1.5GiB, 800MB")
    return size


def import_list(path: Path, tables: TableList, request: PlanRequest) -> Plan:
    """The plan of TorchRec's in `path`, with predictions where the batch size is known."""
    from planner.cost.predict import predict
    from planner.torchrec_json import import_torchrec

    assert request.topology is not None, "the command requires it"
    topology = parse_topology(request.topology)
    objective = choose("--objective", request.objective or "stages", OBJECTIVES)
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise RequestError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError(f"{path} is no plan of TorchRec's: it holds no object")
    batch_size = batch_size_of(tables, topology, request.batch_size)
    model = cost_model(request.cost or COST_MODELS[0], batch_size)
    return predict(import_torchrec(document, tables.tables, topology), model, batch_size, objective)
