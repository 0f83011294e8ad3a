"""A pool of workers, started once for each world size, that run functions side by side."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

DeviceType = Literal["cpu", "cuda"]


class WorkerPool:
    """`world_size` processes, emulating hosts of `local_world_size` each.

    They use gloo on CPU, or nccl with a CUDA device each.
    """

    def __init__(
        self, world_size: int, local_world_size: int | None = None, device: DeviceType = "cpu"
    ) -> None:
        self.world_size = world_size
        self.device = device
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
            process = context.Process(
                target=_serve, args=(environment, device, theirs), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """`function(*args)` on every rank; the results in rank order.

        A rank that fails leaves the others waiting for it, so the first failure ends the pool.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            waiting = [p for r, p in enumerate(self._pipes) if r not in results]
            ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                self.kill()
                raise TimeoutError(f"only ranks {sorted(results)} answered in {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                ok, results[rank] = pipe.recv()  # type: ignore[union-attr]
                if not ok:
                    self.kill()
                    raise AssertionError(f"rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(self.world_size)]

    @property
    def is_alive(self) -> bool:
        return bool(self._pipes)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._pipes.clear()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(environment: dict[str, str], device: DeviceType, pipe: Connection) -> None:
    os.environ.update(environment)
    import logging

    import torch

    from shardemb.ranks import process_group

    logging.getLogger("torchrec").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with process_group(device):
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((True, function(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
