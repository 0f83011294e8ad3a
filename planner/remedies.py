"""Changes under which tables fit that do not, each the smallest of its kind, tried with a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import BaseModel, ByteSize

from planner.certificate import prove
from planner.constraints import TableConstraint
from planner.errors import UserError
from planner.inputs import Inputs
from planner.needs import table_bytes
from planner.report import format_bytes
from planner.search.objective import Goal
from planner.search.optimize import search
from planner.search.relaxation import Relaxation
from planner.storage import OPTIMIZER_STATE
from planner.topology import Topology

# Memory left out when it is judged what may fit, after a plan was not found with less to spare.
SPARE = (0.0, 0.03, 0.1, 0.25)
DEVICES_A_HOST = (2, 4, 8)  # of a single host with fewer, before there are more hosts
MOST_DEVICES, MOST_TIMES_MORE, LARGEST_PROBLEM = 4096, 64, 300_000  # devices x tables
MOST_HOST_MEMORY = 8 * 2**40  # assumed: hosts with more are rare
HEAVY_OPTIMIZERS = [name for name, (_, of_element) in OPTIMIZER_STATE.items() if of_element]
SHOWN_NAMES, LONGEST_NAME = 3, 30


class Remedy(BaseModel, frozen=True):
    """A change under which a plan was found."""

    kind: str
    words: str
    changes: dict[str, Any]  # by input: hosts, batch_size, {"dtype": {table: ...}}, ...
    extent: float  # the part that is changed, or added, of what is changed
    step_ms: float  # of the first plan found: a search may find a better one


class Remedies(NamedTuple):
    """What was found, the smallest change first, and what was not."""

    found: tuple[Remedy, ...]
    without_success: tuple[str, ...]  # kinds of changes that are not enough
    not_tried: tuple[str, ...]  # or not to the end, for lack of time


@dataclass(frozen=True)
class Change:
    """Other inputs, what is different in words and as data, and how large a part that is."""

    inputs: Inputs
    words: str
    changes: dict[str, Any]
    extent: float

    def as_remedy(self, kind: str, step_ms: float) -> Remedy:
        words, changes, extent = self.words, self.changes, round(self.extent, 4)
        return Remedy(kind=kind, words=words, changes=changes, extent=extent, step_ms=step_ms)


@dataclass(frozen=True)
class Lever:
    """A kind of change that can be made by degrees, from 1 to `most`."""

    kind: str
    most: int
    at: Callable[[int], Change]


def find_remedies(inputs: Inputs, deadline: float) -> Remedies:
    """No further change is looked for after `deadline`, of time.monotonic()."""
    found: list[Remedy] = []
    failed: list[str] = []
    not_tried: list[str] = []
    for lever in _levers(inputs) if inputs.topology.hardware else ():
        if not lever.most:
            continue
        remedy = _smallest_that_fits(lever, deadline)
        if remedy:
            found.append(remedy)
        else:
            (not_tried if time.monotonic() > deadline else failed).append(lever.kind)
    found.sort(key=lambda remedy: remedy.extent)
    return Remedies(tuple(found), tuple(failed), tuple(not_tried))


def _smallest_that_fits(lever: Lever, deadline: float) -> Remedy | None:
    """The smallest degree that is not proven too small and under which a plan is found.

    Where none is found, the smallest that leaves some memory to spare, and then more.
    """
    tried = 0
    for spare in SPARE:
        degree = None
        if time.monotonic() <= deadline:
            degree = _least_degree(lever, spare, max(tried, 1))
        if degree is None:
            return None
        if degree == tried:
            continue
        change, tried = lever.at(degree), degree
        step_ms = first_step_ms(change.inputs)
        if step_ms is not None:
            return change.as_remedy(lever.kind, step_ms)
    return None


def _least_degree(lever: Lever, spare: float, at_least: int) -> int | None:
    """The smallest degree, of `at_least`, that is not proven too small; None if all are.

    Small degrees are looked at first, since small problems take less time. The share `spare` of
    what devices and hosts have is left out.
    """

    def may_fit(degree: int) -> bool:
        try:
            problem = lever.at(degree).inputs.memory_problem()
        except UserError:  # constraints that contradict the change
            return False
        left = problem.fixed_memory + (problem.memory_limit - problem.fixed_memory) * (1 - spare)
        host = problem.host_memory_limit * (1 - spare)
        return prove(replace(problem, memory_limit=left, host_memory_limit=host)) is None

    low, high = at_least - 1, at_least
    if not may_fit(lever.most):
        return None
    while high < lever.most and not may_fit(high):
        low, high = high, min(2 * high, lever.most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if may_fit(middle) else (middle, high)
    return high


def first_step_ms(inputs: Inputs) -> float | None:
    """The step of the first plan that the search finds; None where it finds none."""
    try:
        problem = inputs.problem()
    except UserError:  # the cost model may know other hardware only
        return None
    over = time.monotonic()
    placement = search(Relaxation(Goal(problem, inputs.objective)), seed=0, deadline=over)
    return None if placement is None else placement.objective


# --- Kinds of changes


def _levers(inputs: Inputs) -> Iterator[Lever]:
    for name in TableConstraint.model_fields:
        yield _constraint_lever(inputs, name)
    yield _table_lever(inputs, "dtype", "fp16", ("fp32",))
    yield _table_lever(inputs, "optimizer", "rowwise_adagrad", HEAVY_OPTIMIZERS)
    if hasattr(inputs.cost_model, "batch_size"):  # others know one batch size only
        yield _batch_lever(inputs)
    hardware = inputs.topology.hardware
    if hardware is not None and not hardware.is_cpu:  # whose device memory is that of its host
        yield _host_memory_lever(inputs)
    yield _devices_lever(inputs)


def _constraint_lever(inputs: Inputs, name: str) -> Lever:
    """One field of the constraints of more and more tables, the largest first."""
    free = TableConstraint.model_fields[name].default
    given = inputs.constraints
    held = [t for t in _by_size(inputs) if t in given and getattr(given[t], name) != free]

    def at(degree: int) -> Change:
        lifted = {t: given[t].model_copy(update={name: free}) for t in held[:degree]}
        return Change(
            replace(inputs, constraints={**given, **lifted}),
            f"constraints.{name} lifted for {listed(lifted)}",
            {"constraints": {table: {name: free} for table in lifted}},
            len(lifted) / len(inputs.tables),
        )

    return Lever(name, len(held), at)


def _table_lever(inputs: Inputs, name: str, value: str, instead_of: Collection[str]) -> Lever:
    """Another dtype or optimizer for more and more tables, the largest first."""
    sizes = _by_size(inputs)
    heavy = {t.name for t in inputs.tables if getattr(t, name) in instead_of}
    held = [table for table in sizes if table in heavy]

    def at(degree: int) -> Change:
        changed = dict.fromkeys(held[:degree], value)
        tables = tuple(
            t.model_copy(update={name: value}) if t.name in changed else t for t in inputs.tables
        )
        return Change(
            replace(inputs, tables=tables),
            f"{name} {value} for {listed(changed)}",
            {name: changed},
            sum(sizes[table] for table in changed) / sum(sizes.values()),
        )

    return Lever(name, len(held), at)


def _by_size(inputs: Inputs) -> dict[str, int]:
    """Bytes of each table, the largest first."""
    return {t.name: table_bytes(t) for t in sorted(inputs.tables, key=table_bytes, reverse=True)}


def _batch_lever(inputs: Inputs) -> Lever:
    """The batch halved again and again."""

    def at(degree: int) -> Change:
        size = inputs.batch_size >> degree
        model: Any = inputs.cost_model  # is made for a batch size
        return Change(
            replace(inputs, batch_size=size, cost_model=replace(model, batch_size=size)),
            f"batch size {size:,} instead of {inputs.batch_size:,}",
            {"batch_size": size},
            1 - size / inputs.batch_size,
        )

    return Lever("batch_size", inputs.batch_size.bit_length() - 1, at)


def _host_memory_lever(inputs: Inputs) -> Lever:
    """More memory of hosts for tables, up to what takes all of them in one host."""
    hardware = inputs.topology.hardware
    assert hardware is not None, "there are no limits to exceed"
    now, everything = int(hardware.host_memory_bytes), sum(map(table_bytes, inputs.tables))
    unit = 2 ** max(everything.bit_length() - 10, 0)

    def at(degree: int) -> Change:
        size = -(-now // unit) * unit + degree * unit
        larger = hardware.model_copy(update={"host_memory_bytes": ByteSize(size)})
        return Change(
            replace(inputs, topology=inputs.topology.model_copy(update={"hardware": larger})),
            f"{format_bytes(size)} of each host's memory for tables instead of "
            f"{format_bytes(now)} (hardware.host_memory_bytes)",
            {"host_memory_bytes": size},
            (size - now) / max(now, hardware.device_memory_bytes),
        )

    most = min(everything, max(MOST_HOST_MEMORY - now, 0)) // unit + 1
    return Lever("host_memory", most, at)


def _devices_lever(inputs: Inputs) -> Lever:
    """More devices on a single host that has few, and then more hosts."""
    now = inputs.topology
    shapes = _larger_shapes(now, len(inputs.tables))

    def at(degree: int) -> Change:
        hosts, local = shapes[degree - 1]
        larger = {"world_size": hosts * local, "local_world_size": local}
        topology = now.model_copy(update=larger)
        return Change(
            replace(inputs, topology=topology),
            f"{shape(topology)} instead of {shape(now)}",
            {"hosts": hosts, "devices_per_host": local},
            topology.world_size / now.world_size - 1,
        )

    return Lever("devices", len(shapes), at)


def _larger_shapes(topology: Topology, tables: int) -> list[tuple[int, int]]:
    """(hosts, devices on each), ascending; no more than can be tried quickly."""
    hosts, local = topology.num_hosts, topology.local_world_size
    shapes = [(1, n) for n in DEVICES_A_HOST if hosts == 1 and n > local]
    local = max(local, *DEVICES_A_HOST) if hosts == 1 else local
    quick = max(LARGEST_PROBLEM // tables, 2 * topology.world_size)
    most = min(MOST_DEVICES, MOST_TIMES_MORE * topology.world_size, quick)
    return shapes + [(n, local) for n in range(hosts + 1, most // local + 1)]


# --- Words


def shape(topology: Topology) -> str:
    """As --topology is written."""
    kind = f"x{topology.hardware.kind}" if topology.hardware else ""
    return f"{topology.num_hosts}x{topology.local_world_size}{kind}"


def listed(names: Iterable[str]) -> str:
    """The first few names."""
    every = list(map(_short, names))
    shown = ", ".join(every[:SHOWN_NAMES])
    return shown if len(every) <= SHOWN_NAMES else f"{shown} and {len(every) - SHOWN_NAMES} more"


def _short(name: str) -> str:
    """Without what would move the cursor."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 3]}..."
