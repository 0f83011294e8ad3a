"""Collectives over the process group's backend, timed: gloo on CPU, nccl on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shardemb.profiler.timing import WARM_UP, Timing, is_enough, summarize, timed
from shardemb.profiler.workloads import CollectiveCall


def time_collective(call: CollectiveCall, device: torch.device) -> Timing:
    """The same on every rank: all start together, and the slowest of them counts."""
    work = _work(call, device)
    times: list[float] = []
    while not is_enough(times[WARM_UP:]):
        dist.barrier()
        slowest = torch.tensor(timed(device, work)[1], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # so all ranks agree on what is enough
        times.append(slowest.item())
    return summarize(times[WARM_UP:])


def _work(call: CollectiveCall, device: torch.device) -> Callable[[], Any]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = [size // 4 for size in call.sent_bytes]
    own = counts[rank]
    if call.kind == "all_to_all":
        sent = torch.rand(own * world_size, device=device)
        received = torch.empty(sum(counts), device=device)
        return lambda: dist.all_to_all_single(received, sent, counts, [own] * world_size)
    part = torch.rand(max(own // world_size, 1), device=device)
    whole = torch.rand(len(part) * world_size, device=device)
    if call.kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    if call.kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    return lambda: dist.all_reduce(whole)
