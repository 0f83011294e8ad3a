"""What a user fixes about a table; the planner chooses the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from planner.errors import RequestError
from planner.geometry import ShardingType
from planner.shards import ComputeKernel
from planner.tables import TableSpec
from planner.topology import Topology


class TableConstraint(BaseModel):
    """Limits on one table's options; what is left out is free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharding_types: tuple[ShardingType, ...] | None = Field(default=None, min_length=1)
    compute_kernels: tuple[ComputeKernel, ...] | None = Field(default=None, min_length=1)
    column_shards: int | None = Field(default=None, gt=0, description="exactly so many")
    min_columns: int = Field(default=4, gt=0, description="the narrowest column shard")
    ranks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="the only ranks that may hold shards"
    )
    group: str | None = Field(
        default=None, description="tables of a group are on the same ranks, sharded alike"
    )


def check_constraints(
    tables: Sequence[TableSpec], constraints: Mapping[str, TableConstraint], topology: Topology
) -> None:
    """RequestError where a constraint names a table or a rank that does not exist."""
    names = {table.name for table in tables}
    for name, constraint in constraints.items():
        if name not in names:
            raise RequestError(f"constraints.{name}: there is no such table")
        beyond = [r for r in constraint.ranks or () if not 0 <= r < topology.world_size]
        if beyond:
            raise RequestError(
                f"constraints.{name}.ranks: {beyond[0]} is no rank; there are ranks 0 to "
                f"{topology.world_size - 1}"
            )
