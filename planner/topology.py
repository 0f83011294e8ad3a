"""The devices a plan is made for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from planner.errors import RequestError
from planner.hardware import Hardware, preset
from planner.strict_yaml import read_yaml
from planner.validation import explain, shorten

MOST_DEVICES = 10**6  # a typing mistake otherwise, and more than a plan could list
_FORM = "HOSTSxDEVICESxKIND, for example 2x8xA100-80GB"


class Topology(BaseModel):
    """`world_size` identical devices, `local_world_size` of them on each host.

    `hardware` is None where it is unknown: enough for plans by rule, not for predictions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int = Field(gt=0)
    local_world_size: int = Field(gt=0)
    hardware: Hardware | None = None

    @model_validator(mode="after")
    def _hosts_are_full(self) -> Topology:
        if self.world_size % self.local_world_size:
            raise ValueError(
                f"world_size {self.world_size} is not a multiple of local_world_size "
                f"{self.local_world_size}: every host must have the same number of devices"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unknown(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan made without hardware says nothing of it, in its fingerprint either."""
        known: dict[str, Any] = fields(self)
        if self.hardware is None:
            known.pop("hardware", None)
        return known

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def device_memory_limit_bytes(self) -> int | None:
        """What tables may take on one device: its memory without the reserved share."""
        if self.hardware is None:
            return None
        free = 1 - self.hardware.reserved_memory_fraction
        return int(self.hardware.device_memory_bytes * free)

    @property
    def host_memory_limit_bytes(self) -> int | None:
        """What tables may take in the memory of one host, all its ranks together."""
        return None if self.hardware is None else int(self.hardware.host_memory_bytes)

    def ranks_of_host(self, host: int) -> range:
        return range(host * self.local_world_size, (host + 1) * self.local_world_size)


def parse_topology(text: str) -> Topology:
    """`HOSTSxDEVICESxKIND` or the path of a topology file; RequestError for anything else."""
    path = Path(text)
    if path.suffix.lower() in (".yaml", ".yml", ".json") or "/" in text:
        return _read_topology(path)
    parts = re.split("[xX]", text, maxsplit=2)
    if len(parts) != 3:
        raise RequestError(f"topology {shorten(text)}: write {_FORM}, or the path of a YAML file")
    hosts, devices, kind = parts
    try:
        hardware = preset(kind)
    except RequestError as error:
        raise RequestError(f"topology {shorten(text)}: {error}") from error
    return _topology(
        _count(text, "hosts", hosts), _count(text, "devices", devices), hardware, shorten(text)
    )


def _count(text: str, what: str, digits: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,6}", digits):
        raise RequestError(
            f"topology {shorten(text)}: the number of {what} must be a positive integer "
            f"(found {shorten(digits)}); write {_FORM}"
        )
    return int(digits)


def _topology(hosts: int, devices: int, hardware: Hardware, where: str) -> Topology:
    if hosts * devices > MOST_DEVICES:
        raise RequestError(
            f"topology {where}: {hosts} x {devices} devices are more than {MOST_DEVICES}"
        )
    return Topology(world_size=hosts * devices, local_world_size=devices, hardware=hardware)


class _TopologyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hosts: int = Field(gt=0)
    devices_per_host: int = Field(gt=0, description="on each host")
    hardware: Hardware


def _read_topology(path: Path) -> Topology:
    document = read_yaml(path, "topology")
    try:
        if "hardware" in document:
            document["hardware"] = _fields_of(document["hardware"])
        file = _TopologyFile.model_validate(document)
    except RequestError as error:
        raise RequestError(f"{path} is not a valid topology:\n  {error}") from error
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, _TopologyFile))
        raise RequestError(f"{path} is not a valid topology:\n{lines}") from error
    return _topology(file.hosts, file.devices_per_host, file.hardware, str(path))


def _fields_of(hardware: Any) -> Any:
    """The fields that a kind's name or `like: KIND` stands for; others are kept as they are."""
    if isinstance(hardware, str):
        return _preset_at("hardware", hardware)
    if not isinstance(hardware, dict):
        raise RequestError(
            f"hardware: give the name of a kind, or fields (found {shorten(hardware)})"
        )
    if "like" not in hardware:
        return hardware
    own = {key: value for key, value in hardware.items() if key != "like"}
    return {**_preset_at("hardware.like", hardware["like"]), **own}


def _preset_at(key: str, kind: Any) -> dict[str, Any]:
    if not isinstance(kind, str):
        raise RequestError(f"{key}: must be the name of a kind (found {shorten(kind)})")
    try:
        return preset(kind).model_dump()
    except RequestError as error:
        raise RequestError(f"{key}: {error}") from error
