"""The devices a plan is made for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Topology(BaseModel):
    """`world_size` identical devices, `local_world_size` of them on each host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int = Field(gt=0)
    local_world_size: int = Field(gt=0)

    @model_validator(mode="after")
    def _hosts_are_full(self) -> Topology:
        if self.world_size % self.local_world_size:
            raise ValueError(
                f"world_size {self.world_size} is not a multiple of local_world_size "
                f"{self.local_world_size}: every host must have the same number of devices"
            )
        return self

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.local_world_size

    def ranks_of_host(self, host: int) -> range:
        return range(host * self.local_world_size, (host + 1) * self.local_world_size)
