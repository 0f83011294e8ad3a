"""This worker's place among the ranks, from the environment that torchrun or `shardemb` sets."""

from __future__ import annotations

import os
import socket
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
    _check_hosts()
    yield chosen
    # Not after an exception: other ranks may be in a collective that this would wait for.
    dist.destroy_process_group()


def _check_hosts() -> None:
    """RequestError where ranks are not as Topology has them: as many on each host, in one row."""
    here = socket.gethostname(), int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    places = [here] * dist.get_world_size()
    dist.all_gather_object(places, here)
    sizes = {host: size for host, size, _ in places}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} on {host}" for host, size in sizes.items())
        raise RequestError(f"every host must have the same number of workers; found {found}")
    if any(local != rank % here[1] for rank, (_, _, local) in enumerate(places)):
        found = ", ".join(f"{rank}: {host}" for rank, (host, _, _) in enumerate(places))
        raise RequestError(f"ranks of one host must follow each other; found {found}")


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
