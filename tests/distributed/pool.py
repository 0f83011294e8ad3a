"""A pool of gloo workers, started once for each world size, that run functions side by side."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerPool:
    """`world_size` processes, emulating hosts of `local_world_size` each."""

    def __init__(self, world_size: int, local_world_size: int | None = None) -> None:
        self.world_size = world_size
        self.local_world_size = local_world_size or world_size
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank % self.local_world_size),
                "LOCAL_WORLD_SIZE": str(self.local_world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = context.Process(target=_serve, args=(environment, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """`function(*args)` on every rank; the results in rank order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
            results.append(pipe.recv())
        errors = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(results) if not ok]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    import logging

    import torch
    import torch.distributed as dist

    logging.getLogger("torchrec").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
