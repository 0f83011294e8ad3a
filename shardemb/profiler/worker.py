"""One process that measures: `python -m shardemb.profiler.worker FOLDER SECONDS SEED THREADS`.

Alone it measures the device: kernels, and on a GPU copies and matmuls. Started as one of several
ranks it measures collectives over all of them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from planner import UserError
from shardemb.failure import report_failures
from shardemb.profiler.collectives import time_collective
from shardemb.profiler.environment import this_environment
from shardemb.profiler.kernels import time_copy, time_kernel, time_matmul
from shardemb.profiler.store import PATTERN, Store, environment_of
from shardemb.profiler.timing import NOISY, Timing
from shardemb.profiler.workloads import (
    CollectiveCall,
    DenseMatmul,
    HostCopy,
    KernelSet,
    draw_collective,
    draw_device_work,
)
from shardemb.quiet import silence_libraries
from shardemb.ranks import process_group


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
    until = time.monotonic() + seconds
    while True:
        number = _number_for_all(store, until, device)
        if number < 0:
            break
        call = draw_collective(seed, number, world_size)
        timing = time_collective(call, device)
        if store:
            store.append(_collective_row(call, timing))
    if store:
        store.flush()


def _number_for_all(store: Store | None, until: float, device: torch.device) -> int:
    """The number that rank 0 is at; negative when the time is over."""
    number = store.next_number if store and time.monotonic() < until else -1
    shared = torch.tensor([number], device=device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def _collective_row(call: CollectiveCall, timing: Timing) -> dict[str, Any]:
    return _row(call.kind, timing, sent_bytes=list(call.sent_bytes))


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


def main(folder: str, seconds: str, seed: str, threads: str) -> int:
    silence_libraries()
    torch.set_num_threads(int(threads))
    with report_failures() as outcome, process_group() as device:
        measure = measure_collectives if dist.get_world_size() > 1 else measure_device
        measure(Path(folder), float(seconds), int(seed), device)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
