"""Device kinds x counts x batch sizes: which fit, how fast they are, and where more do not help."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.errors import PlannerError, RequestError
from planner.hardware import Hardware, preset
from planner.plan import Plan
from planner.request import COST_MODELS, OBJECTIVES, PlanRequest, batch_size_of, plan_list
from planner.table_list import TableList
from planner.topology import MOST_DEVICES, Topology, parse_topology
from planner.validation import nearest, shorten

WORTH_IT = 0.5  # of what a device did before: what each added one must do
MS_AN_HOUR = 3_600_000


@dataclass(frozen=True)
class SweepRequest:
    """What to sweep over, as it was given; `local` devices are on a host."""

    kinds: str
    devices: str
    batch_sizes: str | None = None
    local: int = 8
    prices: tuple[str, ...] = ()  # KIND=USD of a device for an hour


@dataclass(frozen=True)
class Cell:
    """A number of devices; `reason` says why no plan fits them, and then all below is None.

    `efficiency` is the speed of a device over that with the fewest devices that fit; `gain` the
    speed of each device added since the count before, over that of a device there.
    """

    devices: int
    hosts: int
    batch_size: int  # rows on each rank
    reason: str | None = None
    step_ms: float | None = None
    bound_ms: float | None = None
    samples_per_second: float | None = None
    device_ms_per_1000_samples: float | None = None
    usd_per_million_samples: float | None = None
    efficiency: float | None = None
    gain: float | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def pays(self) -> bool:
        """These devices are of use beside the count before."""
        return self.gain is None or self.gain >= WORTH_IT


@dataclass(frozen=True)
class Line:
    """One kind and batch size on more and more devices."""

    kind: str
    batch: str
    cells: tuple[Cell, ...]

    @property
    def fewest_devices(self) -> int | None:
        """That fit."""
        return next((cell.devices for cell in self.cells if cell.fits), None)

    @property
    def stops_at(self) -> int | None:
        """The first count whose added devices do not pay."""
        return next((cell.devices for cell in self.cells if cell.fits and not cell.pays), None)

    @property
    def scales_to(self) -> int | None:
        """The largest count before that."""
        end = self.stops_at or self.cells[-1].devices + 1
        return max((c.devices for c in self.cells if c.fits and c.devices < end), default=None)

    def to_dict(self) -> dict[str, Any]:
        limits = ("fewest_devices", "scales_to", "stops_at")
        return {**{limit: getattr(self, limit) for limit in limits}, **asdict(self)}


@dataclass(frozen=True)
class Sweep:
    """All that was tried."""

    objective: str
    cost_model: str
    lines: tuple[Line, ...]

    def to_dict(self) -> dict[str, Any]:
        """For json.dumps."""
        lines = [line.to_dict() for line in self.lines]
        return {"objective": self.objective, "cost_model": self.cost_model, "lines": lines}


def sweep_tables(
    tables: TableList,
    asked: SweepRequest,
    request: PlanRequest,
    on_progress: Callable[[str], None] = lambda now: None,
) -> Sweep:
    """Plan for every combination, each as `request` says."""
    kinds = parse_kinds(asked.kinds)
    prices = parse_prices(asked.prices, kinds)
    counts = sorted(set(parse_counts("--devices", asked.devices)))
    hosts = [_topology(count, asked.local) for count in counts]
    sizes = _batch_sizes(asked)
    number, total = itertools.count(1), len(kinds) * len(hosts) * len(sizes)

    def cell(topology: Topology, size: int | None) -> Cell:
        batch_size = batch_size_of(tables, topology, size)
        what = f"{_devices(topology)}, {batch_size:,} rows each"
        on_progress(f"{next(number)} of {total}: {what}")
        plan = _plan(tables, topology, replace(request, batch_size=batch_size))
        return _cell(plan, topology, batch_size, prices)

    lines = []
    for hardware, size in itertools.product(kinds, sizes):
        on_kind = [topology.model_copy(update={"hardware": hardware}) for topology in hosts]
        cells = [cell(topology, size) for topology in on_kind]
        lines.append(Line(hardware.kind, _batch(tables, size), _compared(cells)))
    return Sweep(request.objective or OBJECTIVES[0], request.cost or COST_MODELS[0], tuple(lines))


def _topology(devices: int, local: int) -> Topology:
    """Full hosts; fewer devices than a host has are one host."""
    on_a_host = min(devices, local)
    if devices > MOST_DEVICES:
        raise RequestError(f"--devices {devices}: more than {MOST_DEVICES:,} cannot be planned for")
    if devices % on_a_host:
        raise RequestError(
            f"--devices {devices}: these are not full hosts of {local}; choose a multiple, or "
            "--local"
        )
    return Topology(world_size=devices, local_world_size=on_a_host)


def _batch_sizes(asked: SweepRequest) -> list[int | None]:
    """None is what the table list says."""
    if asked.batch_sizes is None:
        return [None]
    return [*sorted(set(parse_counts("--batch-sizes", asked.batch_sizes)))]


def _batch(tables: TableList, size: int | None) -> str:
    """Of ranks alike, or where the table list says so, of all together."""
    per_rank = size or tables.batch_size_per_rank
    return f"{per_rank:,} a rank" if per_rank else f"{tables.batch_size_global:,} in all"


def _devices(topology: Topology) -> str:
    kind = topology.hardware.kind if topology.hardware else "devices"
    return f"{topology.world_size:,} x {kind}"


def _plan(tables: TableList, topology: Topology, request: PlanRequest) -> Plan | str:
    """The plan, or why there is none."""
    from planner.feasibility import DoesNotFit

    try:
        return plan_list(tables, topology, request)
    except DoesNotFit as error:
        return error.summary  # the whole message takes seconds
    except PlannerError as error:
        return str(error)


def _cell(
    plan: Plan | str, topology: Topology, batch_size: int, prices: Mapping[str, float]
) -> Cell:
    devices = topology.world_size
    cell = Cell(devices, topology.num_hosts, batch_size)
    if isinstance(plan, str):
        return replace(cell, reason=plan)
    assert topology.hardware is not None and plan.predicted.step_ms is not None
    step_ms, price = plan.predicted.step_ms, prices.get(topology.hardware.kind)
    ms_a_row = step_ms / batch_size  # of each device, which does so many rows in a step
    return replace(
        cell,
        step_ms=step_ms,
        bound_ms=plan.predicted.bound_ms,
        samples_per_second=devices / ms_a_row * 1000 if ms_a_row else None,
        device_ms_per_1000_samples=ms_a_row * 1000,
        usd_per_million_samples=None if price is None else price / MS_AN_HOUR * ms_a_row * 1e6,
    )


def _compared(line: Sequence[Cell]) -> tuple[Cell, ...]:
    """Each cell with the one before it and with the first, of those that fit."""
    compared: list[Cell] = []
    first = before = None
    for cell in line:
        if cell.samples_per_second:
            first = first or cell
            cell = replace(cell, efficiency=_speed(cell) / _speed(first), gain=_gain(before, cell))
            before = cell
        compared.append(cell)
    return tuple(compared)


def _speed(cell: Cell) -> float:
    """Samples a second of one device."""
    return (cell.samples_per_second or 0.0) / cell.devices


def _gain(before: Cell | None, cell: Cell) -> float | None:
    if before is None:
        return None
    more = (cell.samples_per_second or 0.0) - (before.samples_per_second or 0.0)
    return more / (cell.devices - before.devices) / _speed(before)


# ------------------------------------------------------------------ what a command is given


def parse_kinds(text: str) -> list[Hardware]:
    """Kinds by name, or topology files that describe one."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise RequestError("--kinds: name kinds of devices, for example A100-80GB,H100")
    found = {hardware.kind: hardware for hardware in map(_hardware, parts)}
    return list(found.values())


def _hardware(text: str) -> Hardware:
    if "/" in text or text.lower().endswith((".yaml", ".yml", ".json")):
        hardware = parse_topology(text).hardware
        assert hardware is not None, "a topology file describes its hardware"
        return hardware
    try:
        return preset(text)
    except RequestError as error:
        raise RequestError(f"--kinds {shorten(text)}: {error}") from error


def parse_counts(option: str, text: str) -> list[int]:
    """`8,16,32`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise RequestError(
            f"{option} {shorten(text)}: write positive whole numbers, for example 8,16,32"
        )
    return [int(part) for part in parts]


def parse_prices(texts: Sequence[str], kinds: Sequence[Hardware]) -> dict[str, float]:
    """`KIND=USD` of one device for an hour."""
    names = {hardware.kind.casefold(): hardware.kind for hardware in kinds}
    prices = {}
    for text in texts:
        kind, _, number = text.rpartition("=")
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", number.strip()):
            raise RequestError(f"--price {shorten(text)}: write KIND=USD, for example H100=2.5")
        name = names.get(kind.strip().casefold())
        if name is None:
            raise RequestError(
                f"--price {shorten(text)}: --kinds has no such kind{nearest(kind, names.values())}"
            )
        prices[name] = float(number)
    return prices
