"""The plan: which shard of which table is on which rank, and what that is predicted to cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.constraints import TableConstraint
from planner.errors import PlannerError, RequestError
from planner.files import write_whole
from planner.geometry import ShardingType
from planner.shards import ComputeKernel
from planner.tables import TableSpec
from planner.topology import Topology

VERSION = 1

Objective = Literal["stages", "max_total"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shard(_Record):
    """A rectangle of a table on one rank; `cost_ms` is None where no cost model was asked.

    The bytes are those of weights, optimizer state and cache.
    """

    rank: int
    row_offset: int
    rows: int
    column_offset: int
    columns: int
    cost_ms: float | None = None
    memory_bytes: int
    host_memory_bytes: int = 0


class TablePlan(_Record):
    """The choice for one table."""

    sharding_type: ShardingType
    compute_kernel: ComputeKernel
    cache_load_factor: float | None = Field(
        default=None, description="share of the rows cached on the device: fused_uvm_caching"
    )
    shards: tuple[Shard, ...] = Field(min_length=1)
    spec: TableSpec | None = Field(default=None, description="the table that was planned for")
    constraint: TableConstraint | None = None
    reason: str | None = Field(default=None, description="why this option was chosen")

    @property
    def num_embeddings(self) -> int:
        return max(s.row_offset + s.rows for s in self.shards)

    @property
    def embedding_dim(self) -> int:
        return max(s.column_offset + s.columns for s in self.shards)


class DevicePlan(_Record):
    """What one rank holds and is predicted to spend in a step.

    Its bytes are those of its shards and, where the batch size is known, of a step's buffers.
    """

    rank: int
    forward_compute_ms: float | None = None
    forward_comm_ms: float | None = None
    backward_compute_ms: float | None = None
    backward_comm_ms: float | None = None
    total_ms: float | None = None
    memory_bytes: int
    memory_limit_bytes: int | None = None


class HostPlan(_Record):
    """Host memory that the tables of a host's devices take."""

    host: int
    memory_bytes: int
    memory_limit_bytes: int | None = None


class Predicted(_Record):
    """Predicted step time, its certified lower bound and how balanced the devices are."""

    step_ms: float | None = None
    bound_ms: float | None = None
    gap_percent: float | None = None
    max_over_mean: float | None = None


class Seconds(_Record):
    """Where planning spent its time."""

    options: float = 0.0
    cost: float = 0.0
    search: float = 0.0


class Plan(_Record):
    """A sharding plan; `plan.json` is this, as it is."""

    version: int = VERSION
    objective: Objective | None = None
    cost_model: str | None = None
    batch_size: int | None = Field(default=None, description="rows a step on each rank")
    topology: Topology
    predicted: Predicted = Predicted()
    devices: tuple[DevicePlan, ...]
    hosts: tuple[HostPlan, ...] = ()
    tables: dict[str, TablePlan]
    seconds: Seconds = Seconds()

    @property
    def fingerprint(self) -> str:
        """Names all that the plan decides and predicts, not the time it took to make."""
        content = self.model_dump_json(exclude={"seconds"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        # pydantic writes much faster than json does; the fingerprint comes second.
        document = self.model_dump_json(indent=1)
        first, rest = document.split("\n", 2)[1:]
        return f'{{\n{first}\n "fingerprint": "{self.fingerprint}",\n{rest}\n'

    def save(self, path: Path) -> None:
        """Write `path` whole or not at all."""
        write_whole(path, self.to_json(), "plan")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan; RequestError where the file is missing, damaged or edited by hand."""
        try:
            text = path.read_text()
        except OSError as error:
            raise RequestError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise RequestError(f"{path} is not a plan: {error}") from error
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: str, path: Path | str = "the text") -> Plan:
        """The plan that `to_json` wrote; `path` is what errors call it, which are those of load."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise RequestError(f"{path} is not a plan: {error}") from error
        if not isinstance(document, dict) or "fingerprint" not in document:
            raise RequestError(f"{path} is not a plan: it has no fingerprint")
        if document.get("version") != VERSION:
            raise RequestError(
                f"{path} is a plan of version {document.get('version')!r}; "
                f"this shardemb reads version {VERSION}: make the plan anew"
            )
        fingerprint = document.pop("fingerprint")
        try:
            plan = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"{path} is not a plan: {where}: {first['msg']}") from error
        if plan.fingerprint != fingerprint:
            raise RequestError(
                f"{path} was changed after it was made: its fingerprint is {fingerprint}, "
                f"its content's is {plan.fingerprint}. Make the plan anew; to choose a table's "
                "sharding yourself, set sharding.tables in the run config"
            )
        return plan

    def check_fits(self, tables: Iterable[TableSpec], topology: Topology) -> None:
        """Raise PlannerError unless this plan is for these tables on this topology."""
        if _shape(self.topology) != _shape(topology):
            raise PlannerError(
                f"the plan is for {_describe(self.topology)}, the run has {_describe(topology)}: "
                "make a plan for this run, or start as many workers as the plan has devices"
            )
        specs = {table.name: table for table in tables}
        problems = [f"table {n} is not in the plan" for n in specs if n not in self.tables]
        problems += [f"the plan has table {n}, the run has not" for n in self.tables.keys() - specs]
        for name in specs.keys() & self.tables.keys():
            found = (self.tables[name].num_embeddings, self.tables[name].embedding_dim)
            wanted = (specs[name].num_embeddings, specs[name].embedding_dim)
            if found != wanted:
                problems.append(
                    f"table {name} is {found[0]} x {found[1]} in the plan, "
                    f"{wanted[0]} x {wanted[1]} in the run"
                )
        if problems:
            shown = "\n".join(f"  {p}" for p in sorted(problems)[:10])
            more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise PlannerError(f"the plan is for other tables:\n{shown}{more}\nMake it anew.")


def _shape(topology: Topology) -> tuple[int, int]:
    return topology.world_size, topology.local_world_size


def _describe(topology: Topology) -> str:
    return f"{topology.world_size} devices, {topology.local_world_size} a host"
