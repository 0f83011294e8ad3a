"""What a cost model is fitted to: times that were measured, and what they were measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from planner.plan import Plan
from planner.shards import Floats
from planner.tables import TableSpec

Collective = Literal["all_to_all", "reduce_scatter", "all_gather", "all_reduce"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


class Environment(BaseModel):
    """Times hold for this and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_type: Literal["cpu", "cuda"]
    device_name: str
    cores: int = Field(gt=0, description="that the processes could use")
    threads: int = Field(gt=0, description="of one kernel")
    torch: str
    fbgemm: str
    date: str = Field(description="of the first measurement, as 2024-12-31")

    @property
    def described(self) -> str:
        """In a line, for messages."""
        versions = f"torch {self.torch}, fbgemm {self.fbgemm}"
        return f"{self.device_name}, {self.threads} of {self.cores} cores a kernel ({versions})"

    def is_like(self, other: Environment) -> bool:
        """Whether measurements there and here can be put together: all but the date agree."""
        return self == other.model_copy(update={"date": self.date})


@dataclass(frozen=True)
class KernelSample:
    """One fused kernel: forward, and backward with the tables' update in it.

    `batch_size` is the rows that it looked up, `task` the model that its tables are of.
    """

    task: int
    tables: tuple[TableSpec, ...]
    batch_size: int
    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class CollectiveSample:
    """One collective; `sent_bytes` [ranks], in an all-to-all to each of the other ranks."""

    kind: Collective
    sent_bytes: tuple[int, ...]
    ms: float


@dataclass(frozen=True)
class PlanSample:
    """A plan that was run; `stages` [ranks, 4] ms, in the order of planner.cost.stages."""

    plan: Plan
    stages: Floats


@dataclass(frozen=True)
class Measurements:
    """All of one machine."""

    environment: Environment
    kernels: tuple[KernelSample, ...]
    collectives: tuple[CollectiveSample, ...]
    plans: tuple[PlanSample, ...] = ()
