"""This worker's place among the ranks, from the environment that torchrun or `shardemb` sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from planner import RequestError

_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[torch.device]:
    """Initialize torch.distributed for a block of code and yield this rank's device.

    gloo on CPU, nccl on CUDA. A process started alone is a world of one.
    """
    if "RANK" not in os.environ:
        os.environ.update(_ALONE)
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    yield chosen
    # Not after an exception: other ranks may be in a collective that this would wait for.
    dist.destroy_process_group()


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto`: this worker's own GPU where each worker of the host can have one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda" and workers > gpus:
        raise RequestError(
            f"launch.device is cuda, but {workers} workers on this host have {gpus} GPUs: "
            "lower launch.nproc_per_node, or set launch.device=cpu"
        )
    if device == "cpu" or workers > gpus:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)
