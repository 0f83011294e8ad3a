"""The answer where nothing fits: a proof of it, what is needed, and changes that would fit."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from planner.certificate import Certificate, prove
from planner.errors import PlannerError
from planner.inputs import Inputs
from planner.needs import Tier, UnitNeed, largest_units, tiers
from planner.remedies import Remedy, find_remedies, listed, shape
from planner.report import format_bytes, format_ms

SECONDS = 5.0  # after which no further change is looked for
WIDTH = 100


class Infeasible(BaseModel, frozen=True):
    """The answer in place of a plan."""

    topology: str
    batch_size: int
    num_tables: int
    certificate: Certificate | None  # None: no plan was found, but that there is none is unproven
    fixed_bytes: int  # of each device's need: embeddings received and the dense model
    tiers: tuple[Tier, ...]
    largest: tuple[UnitNeed, ...]  # tables
    remedies: tuple[Remedy, ...]  # the smallest change first
    without_success: tuple[str, ...]  # kinds of changes that are not enough on their own
    not_tried: tuple[str, ...]  # or not to the end, for lack of time

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"error": "no plan fits the memory", **self.model_dump(mode="json")}


class DoesNotFit(PlannerError):  # noqa: N818 - what it says in full
    """No plan fits the memory: the message and `report` say why, and what would.

    Both are made when they are first asked for, which takes up to some seconds; `summary`, the
    message's first lines without remedies, takes a moment.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.inputs = inputs

    @cached_property
    def report(self) -> Infeasible:
        return diagnose(self.inputs)

    @property
    def summary(self) -> str:
        problem = self.inputs.memory_problem()
        return _headline(shape(problem.topology), prove(problem), tiers(problem))

    def __str__(self) -> str:
        return explain_infeasible(self.report)


def diagnose(inputs: Inputs) -> Infeasible:
    """Why no plan fits, and what would."""
    problem = inputs.memory_problem()
    remedies = find_remedies(inputs, time.monotonic() + SECONDS)
    return Infeasible(
        topology=shape(inputs.topology),
        batch_size=inputs.batch_size,
        num_tables=len(inputs.tables),
        certificate=prove(problem),
        fixed_bytes=problem.fixed_memory,
        tiers=tiers(problem),
        largest=largest_units(problem),
        remedies=remedies.found,
        without_success=remedies.without_success,
        not_tried=remedies.not_tried,
    )


def explain_infeasible(report: Infeasible) -> str:
    """The report on one screen."""
    lines = [
        _headline(report.topology, report.certificate, report.tiers),
        *[_tier_line(t, report.fixed_bytes) for t in report.tiers if t.available_bytes],
        f"largest of {report.num_tables:,} tables, as small as they can be cut:",
        *map(_unit_line, report.largest),
        *_remedy_lines(report),
    ]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def _headline(topology: str, certificate: Certificate | None, memory: Sequence[Tier]) -> str:
    reason = _reason(certificate) if certificate else _unproven(memory[0])
    return f"no plan fits {topology}: {reason}"


def _unproven(device: Tier) -> str:
    share = "more than all"
    if device.needed_bytes is not None:
        share = f"{100 * device.needed_bytes / max(device.available_bytes, 1):.1f}%"
    return (
        "none was found, but that there is none is not proven; if tables could be cut at will, "
        f"they would take {share} of the device memory"
    )


def _reason(certificate: Certificate) -> str:
    if certificate.kind == "sum":
        return _reason_of_sum(certificate)
    needed, available = _bytes(certificate.needed), _bytes(certificate.available)
    if certificate.kind == "fixed":
        return (
            f"under any plan every device holds {needed} of received embeddings and dense model, "
            f"and it may hold {available}"
        )
    names, several = listed(certificate.tables), len(certificate.tables) > 1
    return (
        f"{f'tables {names} together' if several else f'table {names}'} would take at least "
        f"{needed} of one {certificate.tier}'s memory, which has room for {available}"
    )


def _reason_of_sum(certificate: Certificate) -> str:
    device, host = certificate.device_price, certificate.host_price
    needed, available = (
        _bytes(size / (device or host)) for size in (certificate.needed, certificate.available)
    )
    tables = "the tables" if device else "the tables that are too large for devices"
    kind = "memory" if device and host else "device memory" if device else "host memory"
    reason = f"{tables} need at least {needed} of {kind} in all, and there is {available}"
    if device and host:
        reason += f" (a byte of host memory counted as {host / device:.3g})"
    return reason


def _bytes(size: float) -> str:
    return format_bytes(max(int(size), 0))


def _tier_line(tier: Tier, fixed_bytes: int) -> str:
    has, line = format_bytes(tier.available_bytes), _plural(tier.count, tier.name)
    if tier.needed_bytes is None:
        line = f"  {line}: each has {has}, and no amount would be enough alone"
    else:
        line = f"  {line}: each needs at least {format_bytes(tier.needed_bytes)} and has {has}"
    if tier.name == "host":
        return line
    return f"{line} ({format_bytes(fixed_bytes)} are needed under any plan)"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count > 1)}"


def _unit_line(need: UnitNeed) -> str:
    each = format_bytes(need.device_bytes)
    if need.host_bytes:
        each += f" and {format_bytes(need.host_bytes)} of its host"
    return (
        f"  {listed(need.tables)} ({format_bytes(need.whole_bytes)} in all): {each} on "
        f"{_plural(need.devices, 'device')} ({need.option})"
    )


def _remedy_lines(report: Infeasible) -> list[str]:
    lines = ["no single change was found to be enough"]
    if report.remedies:
        lines = ["what would fit, each tried with a first plan, which a search may improve:"]
    lines += [f"  {r.words}: step {format_ms(r.step_ms)} ms" for r in report.remedies]
    if report.without_success:
        lines.append(f"no plan found under one of these alone: {', '.join(report.without_success)}")
    if report.not_tried:
        names = ", ".join(report.not_tried)
        lines.append(f"for lack of time not looked at, or not to the end: {names}")
    return lines
