"""When nothing fits: the proof, and the changes that would fit."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest

from planner.certificate import prove, verify
from planner.constraints import TableConstraint
from planner.feasibility import diagnose, explain_infeasible
from planner.inputs import Inputs
from planner.topology import Topology

from .tight_memory import (
    BATCH,
    GIB,
    MIB,
    asked,
    assert_remedies_hold,
    gpus,
    kinds,
    planned,
    refused,
    table,
)


def test_a_table_larger_than_everything() -> None:
    """2^40 rows on one device: the table is named with what it needs; nothing helps alone."""
    inputs = asked([table("huge", 10**12, 128), table("small", 100)], gpus(40 * GIB))
    error = refused(inputs)
    assert error.exit_code == 1
    certificate = error.report.certificate
    assert (certificate.kind, certificate.tables) == ("table", ("huge",))
    assert certificate.needed >= 10**12 * (128 * 4 + 4)
    assert verify(certificate, inputs.problem())
    assert "huge" in str(error) and "469.3 TiB" in str(error)
    assert not error.report.remedies
    assert "1 device: each needs at least 469.3 TiB and has 40.0 GiB" in str(error)


def test_ten_million_rows_fit() -> None:
    """There is nothing to prove, and a false proof is not accepted."""
    inputs = asked([table("t", 10**7, 128)], gpus(40 * GIB))
    assert planned(inputs).predicted.step_ms > 0
    problem = inputs.problem()
    assert prove(problem) is None
    too_large = asked([table("t", 10**12, 128)], gpus(40 * GIB))
    assert not verify(prove(too_large.problem()), problem)


def test_more_devices() -> None:
    """A table of three devices' memory on one: the host gets four devices, not 8 or two hosts."""
    inputs = asked([table("t", 3 * GIB // 256)], gpus(1.1 * GIB, kind="cpu"))
    report = refused(inputs).report
    assert "devices" in kinds(report)
    remedy = next(r for r in report.remedies if r.kind == "devices")
    assert remedy.changes == {"hosts": 1, "devices_per_host": 4}
    assert remedy.extent == 3
    assert "host_memory" not in kinds(report)  # a CPU's memory is its host's already
    assert_remedies_hold(inputs, report)


def test_more_hosts() -> None:
    """A host of 8 that is too small by half becomes two."""
    inputs = asked([table("t", 12 * GIB // 256)], gpus(GIB, local=8))
    report = refused(inputs).report
    remedy = next(r for r in report.remedies if r.kind == "devices")
    assert remedy.changes == {"hosts": 2, "devices_per_host": 8}
    assert "2x8xA100-40GB instead of 1x8xA100-40GB" in remedy.words
    assert_remedies_hold(inputs, report)


def test_half_precision_where_it_is_enough() -> None:
    """Of three tables the largest alone must be in fp16."""
    tables = [table("a", 4 * MIB), table("b", MIB), table("c", MIB, dtype="fp16")]
    inputs = asked(tables, gpus(1.0 * GIB, local=1))
    report = refused(inputs).report
    remedy = next(r for r in report.remedies if r.kind == "dtype")
    assert remedy.changes == {"dtype": {"a": "fp16"}}
    assert_remedies_hold(inputs, report)


def test_a_lighter_optimizer() -> None:
    """Adam's two states are two thirds of what the table takes."""
    inputs = asked([table("t", MIB, optimizer="adam")], gpus(0.5 * GIB))
    report = refused(inputs).report
    remedy = next(r for r in report.remedies if r.kind == "optimizer")
    assert remedy.changes == {"optimizer": {"t": "rowwise_adagrad"}}
    need = report.largest[0]
    assert need.whole_bytes == 3 * MIB * 64 * 4 and need.tables == ("t",)
    assert need.whole_bytes < need.device_bytes < 1.01 * need.whole_bytes
    assert_remedies_hold(inputs, report)


def test_what_every_device_holds_is_too_much() -> None:
    """Received embeddings alone exceed the device: only a smaller batch helps."""
    batch = 2**20
    inputs = asked([table("t", 1000)], gpus(0.4 * GIB), batch)
    received = 2 * 64 * 4 * batch
    report = refused(inputs).report
    assert (report.certificate.kind, report.certificate.needed) == ("fixed", received)
    assert report.fixed_bytes == received
    assert kinds(report) == {"batch_size"}
    assert report.remedies[0].changes == {"batch_size": batch // 2}
    assert_remedies_hold(inputs, report)


def test_a_dense_model_that_is_too_large() -> None:
    """No change of tables or batch helps: none is offered."""
    report = refused(asked([table("t", 1000)], gpus(GIB), dense=2 * GIB)).report
    assert report.certificate.kind == "fixed" and not report.remedies


def test_a_constraint_that_is_too_narrow() -> None:
    """table_wise on devices too small for it: the constraint is to be lifted, of that table."""
    only = TableConstraint(sharding_types=("table_wise",))
    inputs = asked([table("a", 6 * MIB), table("b", MIB)], gpus(1.1 * GIB, local=2), a=only, b=only)
    report = refused(inputs).report
    assert (report.certificate.kind, report.certificate.tables) == ("table", ("a",))
    first = report.remedies[0]
    assert first.changes == {"constraints": {"a": {"sharding_types": None}}}
    assert "constraints.sharding_types lifted for a" in first.words
    assert_remedies_hold(inputs, report)


def test_pieces_that_do_not_fit_beside_each_other() -> None:
    """Three tables of 0.6 of a device on two devices: the sum fits, the pieces do not, which is
    not proven; what would fit is found all the same."""
    only = TableConstraint(sharding_types=("table_wise",))
    names = ("a", "b", "c")
    tables = [table(name, int(0.6 * 4 * MIB)) for name in names]
    inputs = asked(tables, gpus(GIB, local=2), **dict.fromkeys(names, only))
    report = refused(inputs).report
    assert report.certificate is None
    assert "sharding_types" in kinds(report)
    assert_remedies_hold(inputs, report)


def test_ranks_that_are_too_crowded() -> None:
    """Tables confined to one of two devices, which only together are too large for it."""
    only = TableConstraint(ranks=(0,))
    tables = [table(name, int(0.4 * 4 * MIB)) for name in ("a", "b", "c")]
    inputs = asked(tables, gpus(GIB, local=2), a=only, b=only, c=only)
    report = refused(inputs).report
    remedy = next(r for r in report.remedies if r.kind == "ranks")
    assert remedy.changes["constraints"]
    assert_remedies_hold(inputs, report)


def test_kernels_that_are_not_allowed() -> None:
    """The host has room: a constraint keeps the table out of it."""
    only = TableConstraint(compute_kernels=("fused",))
    inputs = asked([table("t", 8 * MIB)], gpus(GIB, 16 * GIB), t=only)
    report = refused(inputs).report
    remedy = report.remedies[0]
    assert remedy.changes == {"constraints": {"t": {"compute_kernels": None}}}
    assert_remedies_hold(inputs, report)


@pytest.mark.parametrize("host", [0, 0.5])
def test_host_memory_that_is_too_small(host: float) -> None:
    """How much would do: less than a tenth more than the table needs there."""
    inputs = asked([table("t", 8 * MIB)], gpus(GIB, host * GIB))
    report = refused(inputs).report
    remedy = next(r for r in report.remedies if r.kind == "host_memory")
    assert 2 * GIB <= remedy.changes["host_memory_bytes"] < 2.2 * GIB
    assert_remedies_hold(inputs, report)


def test_prices_of_both_kinds_of_memory() -> None:
    """Tables that need all of the hosts' memory and then more than all of the devices'."""
    tables = [table(f"t{i}", 3 * MIB) for i in range(8)]
    inputs = asked(tables, gpus(2 * GIB, 3 * GIB, local=1))
    report = refused(inputs).report
    certificate = report.certificate
    assert certificate.kind == "sum" and certificate.device_price > 0 and certificate.host_price > 0
    device, host = report.tiers
    assert device.needed_bytes == pytest.approx(3 * GIB, rel=0.05)
    assert host.needed_bytes == pytest.approx(4 * GIB, rel=0.05)
    assert verify(certificate, inputs.problem())
    assert not verify(certificate.model_copy(update={"host_price": -1.0}), inputs.problem())
    assert_remedies_hold(inputs, report)


def test_a_group_that_is_too_large() -> None:
    """Tables that must be together are named together; the group is to be dissolved."""
    together = TableConstraint(group="g", sharding_types=("table_wise",))
    names = ("a", "b", "c")
    tables = [table(name, int(0.6 * 4 * MIB)) for name in names]
    inputs = asked(tables, gpus(GIB, local=3), **dict.fromkeys(names, together))
    report = refused(inputs).report
    assert report.certificate.tables == names
    assert "group" in kinds(report)
    assert_remedies_hold(inputs, report)


def test_unknown_hardware_has_no_limit() -> None:
    """No memory is exceeded where none is known."""
    topology = Topology(world_size=2, local_world_size=2)

    @dataclass(frozen=True)
    class Constant:
        name: str = "constant"

        def stage_costs(self, shards: object, topology: Topology) -> np.ndarray:
            return np.ones((len(shards), 4))

    inputs = Inputs((table("t", 10**12, 128),), topology, Constant(), BATCH)
    assert prove(inputs.problem()) is None
    assert planned(inputs).predicted.step_ms == 4


def test_what_is_not_proven_is_said_to_be_unproven() -> None:
    """Where only the search failed, the message says that, and how full it would be."""
    inputs = asked([table("t", MIB)], gpus(GIB))
    report = diagnose(inputs)
    assert report.certificate is None
    message = explain_infeasible(report)
    assert "that there is none is not proven" in message and "25." in message


def test_the_message_is_one_screen_and_the_report_is_json() -> None:
    """Hundreds of tables with long and strange names; the exception survives pickling."""
    name = "x" * 300 + "\x1b[2J[red]"
    tables = [table(f"{i}{name}", MIB) for i in range(300)]
    error = refused(asked(tables, gpus(GIB, GIB, local=2)))
    lines = str(error).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert "\x1b" not in str(error)
    document = json.loads(json.dumps(error.report.to_dict()))
    assert document["tiers"][0]["needed_bytes"] > document["tiers"][0]["available_bytes"]
    assert document["num_tables"] == 300
    again = pickle.loads(pickle.dumps(error))
    assert again.summary == error.summary and "\n" not in error.summary


def test_a_cost_model_for_one_batch_size_only() -> None:
    """No other batch size is offered: what it would cost is unknown."""

    class Fixed:
        name = "fixed"

        def stage_costs(self, shards: object, topology: Topology) -> np.ndarray:
            return np.ones((len(shards), 4))

    inputs = replace(asked([table("t", 1000)], gpus(0.4 * GIB), 2**20), cost_model=Fixed())
    report = diagnose(inputs)
    assert not report.remedies and "batch_size" not in report.without_success
