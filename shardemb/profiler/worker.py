"""One process that measures: `python -m shardemb.profiler.worker WHAT FOLDER SECONDS SEED THREADS`.

WHAT is `device`, for a process alone: kernels, and on a GPU copies and matmuls; or, for each of
several ranks, `collectives` or `plans`.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from planner import Plan, UserError
from shardemb.failure import report_failures
from shardemb.profiler.collectives import time_collective
from shardemb.profiler.environment import this_environment
from shardemb.profiler.kernels import time_copy, time_kernel, time_matmul
from shardemb.profiler.plan_timing import PlanTiming, time_plan
from shardemb.profiler.store import PATTERN, Store, environment_of
from shardemb.profiler.timing import NOISY, Timing
from shardemb.profiler.workloads import (
    DenseMatmul,
    HostCopy,
    KernelSet,
    draw_collective,
    draw_device_work,
    draw_plan,
)
from shardemb.quiet import silence_libraries
from shardemb.ranks import process_group
from shardemb.train import leave

PLAN_REPETITIONS = 7


def measure_device(folder: Path, seconds: float, seed: int, device: torch.device) -> None:
    """Measure what one device does, for so long, from where the folder's files stop."""
    store = _open(folder, "device", device)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        work = draw_device_work(seed, store.next_number, device.type)
        generator = np.random.default_rng([seed, 3, store.next_number])
        store.append(_measured(work, device, generator))
    store.flush()


def _measured(
    work: KernelSet | HostCopy | DenseMatmul, device: torch.device, generator: np.random.Generator
) -> dict[str, Any]:
    if isinstance(work, HostCopy):
        return _row("host_to_device", time_copy(work, device), sent_bytes=[work.size_bytes])
    if isinstance(work, DenseMatmul):
        return _row("dense_matmul", time_matmul(work, device), shape=list(work.shape))
    forward, backward = time_kernel(work, device, generator)
    columns = ("num_embeddings", "embedding_dim", "pooling_factor", "reuse_histogram")
    return {
        "kind": "kernel",
        "task": work.task,
        "batch_size": work.batch_size,
        "dtype": work.tables[0].dtype,
        "optimizer": work.tables[0].optimizer,
        "tables": [{name: getattr(t, name) for name in columns} for t in work.tables],
        "forward_ms": forward.median_ms,
        "backward_ms": backward.median_ms,
        **_quality(max(forward, backward, key=lambda timing: timing.error)),
    }


def measure_collectives(folder: Path, seconds: float, seed: int, device: torch.device) -> None:
    """Measure collectives over all ranks; rank 0 says what comes next, and keeps the rows."""
    world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
    store = _open(folder, f"collective_{world_size}", device) if is_first else None
    for number in _numbers(store, seconds, device):
        call = draw_collective(seed, number, world_size)
        timing = time_collective(call, device)
        if store:
            store.append(_row(call.kind, timing, sent_bytes=list(call.sent_bytes)))


def measure_plans(folder: Path, seconds: float, seed: int, device: torch.device) -> None:
    """Run random plans over all ranks."""
    world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
    store = _open(folder, f"plan_{world_size}", device) if is_first else None
    for number in _numbers(store, seconds, device):
        plan = draw_plan(seed, number, world_size, device.type)
        timing = time_plan(plan, device, repetitions=PLAN_REPETITIONS, seed=number)
        gc.collect()  # the tables: collectives keep modules in cycles
        if store:
            store.append(plan_row(plan, timing))


def plan_row(plan: Plan, timing: PlanTiming) -> dict[str, Any]:
    return _row("plan", timing.step, plan=plan.to_json(), stages=timing.stages.ravel().tolist())


def _numbers(store: Store | None, seconds: float, device: torch.device) -> Iterator[int]:
    """What comes next, on all ranks: as rank 0's `store` says, which is flushed at the end."""
    until = time.monotonic() + seconds
    while (number := _number_for_all(store, until, device)) >= 0:
        yield number
    if store:
        store.flush()


def _number_for_all(store: Store | None, until: float, device: torch.device) -> int:
    """The number that rank 0 is at; negative when the time is over."""
    number = store.next_number if store and time.monotonic() < until else -1
    shared = torch.tensor([number], device=device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def _row(kind: str, timing: Timing, **columns: Any) -> dict[str, Any]:
    return {"kind": kind, "ms": timing.median_ms, **columns, **_quality(timing)}


def _quality(timing: Timing) -> dict[str, Any]:
    return {
        "repetitions": timing.repetitions,
        "spread": timing.spread,
        "outliers": timing.outliers,
        "is_noisy": timing.error > NOISY,
    }


def _open(folder: Path, sequence: str, device: torch.device) -> Store:
    """The store of a sequence; UserError where its files are of another machine or version."""
    here = this_environment(device)
    there = environment_of(sorted(folder.glob(PATTERN)))
    if there is not None and not there.is_like(here):
        raise UserError(
            f"{folder} holds measurements of {there.described}, this is {here.described}: "
            "choose another --out"
        )
    return Store(folder, sequence, here)


MEASURE: dict[str, Callable[[Path, float, int, torch.device], None]] = {
    "device": measure_device,
    "collectives": measure_collectives,
    "plans": measure_plans,
}


def main(what: str, folder: str, seconds: str, seed: str, threads: str) -> int:
    silence_libraries()
    # That a plan splits rows which share a momentum is told where it is trained.
    logging.getLogger("shardemb.sharding").setLevel(logging.ERROR)
    torch.set_num_threads(int(threads))
    with report_failures() as outcome, process_group() as device:
        MEASURE[what](Path(folder), float(seconds), int(seed), device)
    return outcome.exit_code


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
