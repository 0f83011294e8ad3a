"""The proof that no plan fits, and its check. Neither trusts a solver or a search.

Three kinds: what every device holds under any plan is too much; a table has no option of which
even one item fits; or all tables together need too much. The last is linear programming's: at any
prices for a byte of device and of host memory, a plan costs at least what the cheapest options of
all tables do, and at most what all memory is worth. Where the first exceeds the second there is
no plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel

from planner.options import DEVICE, Problem
from planner.shards import TYPE_CODE, Bools, Floats, Ints

MARGIN = 1e-9  # by which a proof must exceed what there is: rounding of sums
HIGHEST_PRICE = 1000.0  # of a host byte, in device bytes: it is near 1


class Certificate(BaseModel, frozen=True):
    """A proof that no plan fits, which `verify` recomputes; sizes are bytes.

    `fixed`: every device holds `needed` under any plan. `table`: of all options of `tables`, which
    stay together, the one nearest to fitting needs `needed` in one place. `sum`: at these prices
    the cheapest options of all tables cost `needed`, and all the memory is worth `available`.
    """

    kind: Literal["fixed", "table", "sum"]
    needed: float
    available: float
    tier: Literal["device", "host"] = "device"
    tables: tuple[str, ...] = ()
    device_price: float = 1.0
    host_price: float = 0.0


def prove(problem: Problem) -> Certificate | None:
    """A certificate that no plan fits; None where none is found."""
    limit, fixed = problem.memory_limit, problem.fixed_memory
    if np.isinf(limit):
        return None
    if fixed > limit:
        return Certificate(kind="fixed", needed=fixed, available=limit)
    alone = _table_that_fits_nowhere(problem)
    return alone or next((c for c in _sums(problem) if verify(c, problem)), None)


def verify(certificate: Certificate, problem: Problem) -> bool:
    """Whether the certificate proves that no plan of `problem` fits, recomputed from its options.

    Of a sum its prices are used: whatever they are, they prove no falsehood.
    """
    if certificate.kind == "fixed":
        return problem.fixed_memory > problem.memory_limit
    if certificate.kind == "table":
        table = [t.name for t in problem.tables].index(certificate.tables[0])
        unit = next(unit for unit, members in enumerate(problem.units) if table in members)
        return not _usable(problem)[problem.options.unit == unit].any()
    if min(certificate.device_price, certificate.host_price) < 0:
        return False
    again = _sum(problem, certificate.device_price, certificate.host_price)
    return again.needed > again.available * (1 + MARGIN)


# --- A table that fits nowhere


def _usable(problem: Problem) -> Bools:
    """Options one item of which fits an empty device and the memory of an empty host."""
    free = problem.memory_limit - problem.fixed_memory
    in_one_host = _bytes_in_one_host(problem) <= problem.host_memory_limit
    return np.asarray((problem.options.memory <= free) & in_one_host)


def _bytes_in_one_host(problem: Problem) -> Floats:
    """What each option puts in some host at least; table_column_wise has all its items in one."""
    options, topology = problem.options, problem.topology
    together = options.sharding_type == TYPE_CODE["table_column_wise"]
    items = np.where(together, options.items, -(-options.items // topology.num_hosts))
    devices = np.where(options.scope == DEVICE, items, topology.local_world_size)
    return np.asarray(options.host_memory * devices)


def _table_that_fits_nowhere(problem: Problem) -> Certificate | None:
    """Of several the one that is farthest from it."""
    lost = np.setdiff1d(problem.options.unit, problem.options.unit[_usable(problem)])
    found = [_nearest_option(problem, int(unit)) for unit in lost]
    return max(found, key=lambda c: c.needed / max(c.available, 1), default=None)


def _nearest_option(problem: Problem, unit: int) -> Certificate:
    own = np.flatnonzero(problem.options.unit == unit)
    free = problem.memory_limit - problem.fixed_memory
    on_device, on_host = problem.options.memory[own], _bytes_in_one_host(problem)[own]
    device_share = on_device / max(free, 1)
    host_share = on_host / max(problem.host_memory_limit, 1)
    i = int(np.maximum(device_share, host_share).argmin())
    in_host = bool(host_share[i] > device_share[i])
    return Certificate(
        kind="table",
        needed=float(on_host[i] if in_host else on_device[i]),
        available=float(problem.host_memory_limit if in_host else free),
        tier="host" if in_host else "device",
        tables=tuple(problem.tables[table].name for table in problem.units[unit]),
    )


# --- Tables that need too much together


@dataclass(frozen=True)
class Demand:
    """Bytes that options take, all their items together, and where each unit's options start."""

    device: Floats
    host: Floats
    starts: Ints

    @classmethod
    def of(cls, problem: Problem, chosen: Bools) -> Demand:
        options = problem.options.select(chosen)
        devices, starts = options.devices(problem.topology), np.diff(options.unit, prepend=-1)
        memory, host_memory = options.memory * devices, options.host_memory * devices
        return cls(memory, host_memory, np.flatnonzero(starts))

    def swapped(self) -> Demand:
        """Hosts for devices."""
        return Demand(self.host, self.device, self.starts)

    def cheapest(self, device_price: float, host_price: float) -> float:
        """What the cheapest options of all units cost."""
        priced = device_price * self.device + host_price * self.host
        return float(np.minimum.reduceat(priced, self.starts).sum()) if len(priced) else 0.0

    def least(self, limit: float) -> tuple[float, float]:
        """The least device bytes where all hosts have `limit`, with options in fractions.

        And the price of a host byte that proves it: the one at which the cheapest options less
        the hosts' worth cost most, a concave function of the price.
        """

        def proven(x: float) -> tuple[float, float]:
            price = HIGHEST_PRICE * x**3  # finer among the small
            return self.cheapest(1.0, price) - price * limit, price

        if not self.host.any():
            return proven(0.0)
        low, high = 0.0, 1.0
        for _ in range(60):
            a, b = low + (high - low) / 3, high - (high - low) / 3
            low, high = (a, high) if proven(a) < proven(b) else (low, b)
        return max(proven(0.0), proven((low + high) / 2))


def _sums(problem: Problem) -> Iterator[Certificate]:
    """Candidates, the plainest first."""
    host_bytes = problem.topology.num_hosts * problem.host_memory_limit
    yield _sum(problem, 1.0, 0.0)
    yield _sum(problem, 0.0, 1.0)
    yield _sum(problem, 1.0, Demand.of(problem, _usable(problem)).least(host_bytes)[1])


def _sum(problem: Problem, device_price: float, host_price: float) -> Certificate:
    topology, free = problem.topology, problem.memory_limit - problem.fixed_memory
    devices, hosts = topology.world_size * free, topology.num_hosts * problem.host_memory_limit
    return Certificate(
        kind="sum",
        needed=Demand.of(problem, _usable(problem)).cheapest(device_price, host_price),
        available=device_price * devices + host_price * hosts,
        device_price=device_price,
        host_price=host_price,
    )
