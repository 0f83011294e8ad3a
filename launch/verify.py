"""`shardemb plan --verify`: run a plan on this machine, and see what it takes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from planner import Plan, RequestError
from planner.comparison import Comparison
from planner.report import format_bytes

REPETITIONS = 15
MOST_RANKS_A_CORE = 4  # more tell nothing: they wait for each other's turns


def verify(plan: Plan) -> Comparison:
    """Run the lookups and exchanges of `plan` with random ids, in a process for each device.

    RequestError where this machine is no place for it.
    """
    from launch.local import run_workers
    from shardemb.profiler.plan_timing import refuse_unknown

    refuse_unknown(plan)
    device = _device(plan)
    if device == "cpu":
        _check_memory(plan)
    with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch:
        path, out = Path(scratch) / "plan.json", Path(scratch) / "timing.jsonl"
        plan.save(path)
        arguments = [device, str(out), str(REPETITIONS), str(path)]
        run_workers(["-m", "shardemb.profiler.plan_worker", *arguments], plan.topology.world_size)
        found = json.loads(out.read_text())
    return Comparison.of(plan, np.array(found["stages"]), found["step"])


def _device(plan: Plan) -> str:
    """What kind the plan is for, where this machine has enough of it."""
    import torch

    topology = plan.topology
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = topology.hardware.is_cpu if topology.hardware else topology.world_size > gpus
    cores = len(os.sched_getaffinity(0))
    most = cores * MOST_RANKS_A_CORE if on_cpu else gpus
    here = f"{cores} cores, enough for {most} ranks" if on_cpu else f"{gpus} GPUs"
    if topology.num_hosts > 1 or topology.world_size > most:
        raise RequestError(
            f"--verify: the plan is for {topology.num_hosts} hosts and {topology.world_size} "
            f"devices ({topology.hardware.kind if topology.hardware else 'cpu'}), this machine "
            f"has {here}: plan for a --topology that it can run"
        )
    return "cpu" if on_cpu else "cuda"


def _check_memory(plan: Plan) -> None:
    wanted = sum(device.memory_bytes for device in plan.devices)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if wanted > free:
        raise RequestError(
            f"--verify: the plan takes {format_bytes(wanted)}, and {format_bytes(free)} of this "
            "machine's memory are free: verify it with fewer rows (num_embeddings)"
        )
