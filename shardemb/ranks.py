"""This worker's place among the ranks, from the environment that torchrun or `shardemb` sets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from planner import RequestError
from shardemb.failure import has_launcher

_MEETING = timedelta(minutes=30)  # for all ranks to come, as torch has it
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
    is_alone = "RANK" not in os.environ
    if is_alone:
        os.environ.update(_ALONE)
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if is_alone or has_launcher():
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_store(rank, ranks), rank=rank, world_size=ranks)
    else:
        dist.init_process_group(backend)
    _check_hosts()
    yield chosen
    # Not after an exception: other ranks may be in a collective that this would wait for.
    dist.destroy_process_group()


def _store(rank: int, ranks: int) -> dist.TCPStore:
    """Where ranks meet, on MASTER_ADDR, an IPv4 address of rank 0's host: left to itself, torch's
    listens on all that it has."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if rank == 0:
        listener = socket.create_server((address, port), backlog=ranks)
        port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        ranks,
        is_master=rank == 0,
        timeout=_MEETING,
        master_listen_fd=listener.detach() if listener else None,
    )


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
