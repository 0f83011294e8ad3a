"""A plan as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from planner import Plan, TablePlan


def print_plan(plan: Plan) -> None:
    """Each table's sharding and ranks, then each rank's memory."""
    console = Console()
    tables = Table("table", "rows", "columns", "sharding", "kernel", "rank (rows x columns)")
    for name, table in plan.tables.items():
        size = (f"{table.num_embeddings:,}", str(table.embedding_dim))
        tables.add_row(name, *size, table.sharding_type, table.compute_kernel, _shards(table))
    console.print(tables)
    devices = Table("rank", "memory")
    for device in plan.devices:
        devices.add_row(str(device.rank), f"{device.memory_bytes / 2**20:,.1f} MiB")
    console.print(devices)
    console.print(f"fingerprint {plan.fingerprint}")


def _shards(table: TablePlan) -> str:
    shown = [f"{s.rank} ({s.rows:,} x {s.columns})" for s in table.shards[:4]]
    return ", ".join(shown) + (f" ... {len(table.shards)} in all" if len(table.shards) > 4 else "")
