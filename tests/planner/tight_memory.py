"""Requests around what memory has room for, and what a user does who follows a remedy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from planner.constraints import TableConstraint
from planner.cost.analytic import AnalyticCost
from planner.cost.predict import predict
from planner.feasibility import DoesNotFit, Infeasible
from planner.hardware import preset
from planner.inputs import Inputs
from planner.make_plan import make_plan
from planner.plan import Plan
from planner.tables import TableSpec
from planner.topology import Topology

GIB, MIB = 2**30, 2**20
BATCH = 64


def gpus(
    device: float, host: float = 0, hosts: int = 1, local: int = 1, kind: str = "A100-40GB"
) -> Topology:
    """Devices with so many bytes for tables, and hosts."""
    memory = {"device_memory_bytes": int(device), "host_memory_bytes": int(host)}
    hardware = preset(kind).model_copy(update={**memory, "reserved_memory_fraction": 0.0})
    return Topology(world_size=hosts * local, local_world_size=local, hardware=hardware)


def table(name: str, rows: int, dim: int = 64, **more: object) -> TableSpec:
    return TableSpec(name=name, num_embeddings=rows, embedding_dim=dim, **more)


def asked(
    tables: list[TableSpec],
    topology: Topology,
    batch: int = BATCH,
    dense: int = 0,
    **constraints: TableConstraint,
) -> Inputs:
    model = AnalyticCost(batch)
    return Inputs(tuple(tables), topology, model, batch, "stages", constraints, dense)


def planned(inputs: Inputs) -> Plan:
    return make_plan(
        inputs.tables,
        inputs.topology,
        inputs.cost_model,
        inputs.batch_size,
        objective=inputs.objective,
        constraints=inputs.constraints,
        dense_bytes=inputs.dense_bytes,
    )


def refused(inputs: Inputs) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        planned(inputs)
    return caught.value


def changed(inputs: Inputs, changes: dict) -> Inputs:
    """What a user does who follows a remedy."""
    topology = inputs.topology
    if "hosts" in changes:
        local = changes["devices_per_host"]
        shape = {"world_size": changes["hosts"] * local, "local_world_size": local}
        topology = topology.model_copy(update=shape)
    if "host_memory_bytes" in changes:
        update = {"host_memory_bytes": changes["host_memory_bytes"]}
        topology = topology.model_copy(
            update={"hardware": topology.hardware.model_copy(update=update)}
        )
    tables = tuple(
        t.model_copy(
            update={
                key: changes[key][t.name]
                for key in ("dtype", "optimizer")
                if t.name in changes.get(key, {})
            }
        )
        for t in inputs.tables
    )
    constraints = {
        name: TableConstraint.model_validate(
            {**constraint.model_dump(), **changes.get("constraints", {}).get(name, {})}
        )
        for name, constraint in inputs.constraints.items()
    }
    batch = changes.get("batch_size", inputs.batch_size)
    return replace(
        inputs,
        tables=tables,
        topology=topology,
        constraints=constraints,
        batch_size=batch,
        cost_model=AnalyticCost(batch),
    )


def assert_remedies_hold(inputs: Inputs, report: Infeasible) -> None:
    """make_plan makes a plan under each, and predict finds it within the limits."""
    for remedy in json.loads(json.dumps(report.to_dict()))["remedies"]:
        other = changed(inputs, remedy["changes"])
        plan = planned(other)
        found = predict(plan, other.cost_model, other.batch_size, "stages", other.dense_bytes)
        for device in found.devices:
            assert device.memory_bytes <= device.memory_limit_bytes
        for host in found.hosts:
            assert host.memory_bytes <= host.memory_limit_bytes
        assert plan.predicted.step_ms <= remedy["step_ms"] * (1 + 1e-6)


def kinds(report: Infeasible) -> set[str]:
    return {remedy.kind for remedy in report.remedies}
