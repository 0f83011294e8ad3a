"""What the HTML page of a plan shows; `plan_page.html` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from planner.cost.stages import STAGES
from planner.page import write_page
from planner.plan import DevicePlan, Plan, TablePlan
from planner.report import (
    STAGE_NAMES,
    by_weight,
    compact_ranks,
    facts,
    format_bytes,
    format_ms,
    format_percent,
    has_costs,
    kernel_name,
    stage_ms,
    stage_total,
    summarize,
    table_ms,
)

TEMPLATE = Path(__file__).with_name("plan_page.html")
# A chart has too few pixels for more bars: of more devices the slowest and the fullest are shown.
MOST_DEVICES = 512
IN_TILES = ("predicted step", "balance")


def write_html(plan: Plan, path: Path) -> None:
    """Write the page `path` whole or not at all."""
    write_page(TEMPLATE, _content(plan), path)


def _content(plan: Plan) -> dict[str, Any]:
    """What the page shows: as the plan has it, but with each table's shards by rank."""
    devices = _shown_devices(plan)
    return {
        "facts": [fact for fact in facts(plan) if fact[0] not in IN_TILES],
        "tiles": _tiles(plan),
        "objective": plan.objective,
        "step_ms": plan.predicted.step_ms,
        "bound_ms": plan.predicted.bound_ms,
        "stage_names": STAGE_NAMES,
        "world_size": plan.topology.world_size,
        "devices_per_host": plan.topology.local_world_size,
        "costs": has_costs(plan),
        "devices": [_device(device) for device in devices],
        "hosts": [host.model_dump() for host in plan.hosts if host.memory_bytes],
        "tables": [_table(plan, name, table) for name, table in by_weight(plan)],
        "summary": summarize(plan),
    }


def _tiles(plan: Plan) -> list[tuple[str, str]]:
    """(number, what it is): what one looks for first."""
    predicted, fullest = plan.predicted, max(plan.devices, key=lambda d: d.memory_bytes)
    limit = fullest.memory_limit_bytes
    of_limit = f" of {format_bytes(limit)}" if limit else ""
    tiles = [
        (_or_none(predicted.step_ms, "{} ms"), "predicted step, embedding tables"),
        (_or_none(predicted.bound_ms, "{} ms"), "lower bound of any plan"),
        (_gap(predicted.gap_percent), "gap to the bound"),
        (_or_none(predicted.max_over_mean, "{} x"), "slowest device to mean"),
        (format_bytes(fullest.memory_bytes), f"fullest device (rank {fullest.rank}){of_limit}"),
        (f"{len(plan.tables):,}", "tables"),
        (f"{plan.topology.world_size:,}", "devices"),
    ]
    return [(number, what) for number, what in tiles if number]


def _or_none(value: float | None, form: str) -> str:
    return "" if value is None else form.format(format_ms(value))


def _gap(percent: float | None) -> str:
    return "" if percent is None else format_percent(percent)


def _shown_devices(plan: Plan) -> Sequence[DevicePlan]:
    if len(plan.devices) <= MOST_DEVICES:
        return plan.devices
    half = MOST_DEVICES // 2
    slowest = sorted(plan.devices, key=lambda d: -stage_total(d))[:half]
    fullest = sorted(plan.devices, key=lambda d: -d.memory_bytes)[:half]
    return sorted({d.rank: d for d in slowest + fullest}.values(), key=lambda d: d.rank)


def _device(device: DevicePlan) -> dict[str, Any]:
    return {
        "rank": device.rank,
        "stages": [_short(stage_ms(device, stage)) for stage in STAGES],
        "total": _short(stage_total(device)),
        "memory": device.memory_bytes,
        "limit": device.memory_limit_bytes,
    }


def _table(plan: Plan, name: str, table: TablePlan) -> dict[str, Any]:
    spec, ms = table.spec, table_ms(table)
    return {
        "name": name,
        "type": table.sharding_type,
        "kernel": kernel_name(table),
        "shards": len(table.shards),
        "ranks": compact_ranks((shard.rank for shard in table.shards), plan.topology),
        "rows": table.num_embeddings,
        "dim": table.embedding_dim,
        "pooling": None if spec is None else _short(spec.pooling_factor),
        "features": None if spec is None else spec.num_features,
        "memory": sum(shard.memory_bytes for shard in table.shards),
        "host_memory": sum(shard.host_memory_bytes for shard in table.shards),
        "ms": None if ms is None else _short(ms),
        "reason": table.reason,
        "runs": _runs(table),
    }


def _runs(table: TablePlan) -> list[tuple[int, int, float, int]]:
    """(first rank, last rank, ms, bytes) of neighbours that hold alike shares of a table.

    A table on all ranks has two runs or so, not thousands of equal entries.
    """
    ms: dict[int, float] = {}
    held: dict[int, int] = {}
    for shard in table.shards:
        ms[shard.rank] = ms.get(shard.rank, 0.0) + (shard.cost_ms or 0.0)
        held[shard.rank] = held.get(shard.rank, 0) + shard.memory_bytes + shard.host_memory_bytes
    entries = [(rank, _short(ms[rank]), held[rank]) for rank in sorted(ms)]
    # Neighbours that are alike have the same distance to their place in the list.
    numbered = groupby(enumerate(entries), key=lambda e: (e[1][0] - e[0], *e[1][1:]))
    groups = [[entry for _, entry in group] for _, group in numbered]
    return [(group[0][0], group[-1][0], *group[0][1:]) for group in groups]


def _short(value: float) -> float:
    """Six digits: more than one can see, and half the page."""
    return float(f"{value:.6g}")
