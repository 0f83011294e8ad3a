"""The stages of embedding collections, timed in steps of a training run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.types import LazyAwaitable, LazyNoWait, ShardedModule

from planner.cost.stages import STAGES

FORWARD_COMPUTE, FORWARD_COMM, BACKWARD_COMPUTE, BACKWARD_COMM = range(len(STAGES))
STEPS = 20  # the first that are timed tell the stages, as many of the last who waits for whom


class StageClock:
    """Milliseconds of this rank in the steps that `step` was around.

    Forward and backward are told apart where the ids, the embeddings and their gradients have
    arrived, so a rank that waits for another one counts that as communication.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._collections = [m for m in model.modules() if isinstance(m, ShardedModule)]
        self.device = device
        self._steps: list[NDArray[np.float64]] = []
        # Of the last steps timed: exchanges, with the wait for other ranks, and the whole step.
        self.recent: deque[tuple[float, float]] = deque(maxlen=STEPS)

    @property
    def steps(self) -> int:
        """How many were timed for the stages."""
        return len(self._steps)

    @property
    def exchange_share(self) -> float | None:
        """Of a step of this rank, with the wait for other ranks; None where no step was timed."""
        if not self.recent:
            return None
        exchange_ms, step_ms = np.median(self.recent, axis=0)
        return float(exchange_ms / step_ms)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step's forward and backward."""
        laps = [_Laps(self.device) for _ in self._collections]
        whole = _Laps(self.device)
        for collection, lap in zip(self._collections, laps, strict=True):
            lap.listen(collection)
        whole.mark("start")
        try:
            yield
        finally:
            for collection in self._collections:
                del collection.input_dist, collection.compute_and_output_dist
        whole.mark("end")
        stages = np.sum([lap.stages() for lap in laps], axis=0)
        self.recent.append((stages[FORWARD_COMM] + stages[BACKWARD_COMM], whole.ms("start", "end")))
        if len(self._steps) < STEPS:
            self._steps.append(stages)

    def stages(self) -> NDArray[np.float64] | None:
        """[ranks, 4]: medians, in the order of planner.cost.stages; None where no step was timed.

        A collective. An exchange is counted as it was on the rank that waited least for others.
        """
        if not self._steps:
            return None
        own = torch.tensor(np.median(self._steps, axis=0), device=self.device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        stages = torch.stack(every).cpu().numpy()
        for exchange in (FORWARD_COMM, BACKWARD_COMM):
            stages[:, exchange] = stages[:, exchange].min()
        return stages


class _Laps:
    """Marks on the way of one batch through one collection."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: dict[str, Any] = {}

    def listen(self, collection: Any) -> None:
        """Have the collection tell, in its next forward and backward, where it is."""
        input_dist = collection.input_dist

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.mark("start")
            return input_dist(*args, **kwargs)

        def run(context: Any, received: Any) -> LazyAwaitable[Any]:
            self.mark("ids")
            outputs = collection.compute(context, received)
            self.mark("looked_up")
            for node in _nodes(outputs):
                node.register_hook(self._marker("updated"))
            for output in outputs:
                if output.requires_grad:
                    output.register_hook(self._marker("gradients"))
            pooled = collection.output_dist(context, outputs).wait()
            self.mark("embeddings")
            for values in _tensors(pooled):
                if values.requires_grad:
                    values.register_hook(self._marker("backward", first=True))
            return LazyNoWait(pooled)

        collection.input_dist, collection.compute_and_output_dist = begin, run

    def stages(self) -> list[float]:
        """[4]; no backward where nothing was trained."""
        exchange = self.ms("start", "ids") + self.ms("looked_up", "embeddings")
        forward = [self.ms("ids", "looked_up"), exchange]
        return [*forward, self.ms("gradients", "updated"), self.ms("backward", "gradients")]

    def mark(self, name: str) -> None:
        if self._on_gpu:
            self._marks[name] = torch.cuda.Event(enable_timing=True)
            self._marks[name].record()
        else:
            self._marks[name] = time.perf_counter()

    def _marker(self, name: str, first: bool = False) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not (first and name in self._marks):
                self.mark(name)

        return hook

    def ms(self, start: str, end: str) -> float:
        if not {start, end} <= self._marks.keys():
            return 0.0
        if self._on_gpu:
            self._marks[end].synchronize()
            return float(self._marks[start].elapsed_time(self._marks[end]))
        # One rank's embeddings are its kernel's output: both marks are hooks of one tensor.
        return max(0.0, 1000.0 * float(self._marks[end] - self._marks[start]))


def _nodes(outputs: list[torch.Tensor]) -> set[Any]:
    """What autograd runs below `outputs`: the kernels' backward, with the tables' update in it."""
    found: set[Any] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [below for below, _ in node.next_functions]
    return found


def _tensors(pooled: Any) -> list[torch.Tensor]:
    """Of a KeyedTensor, or of a JaggedTensor for each feature."""
    parts = pooled.values()
    return [parts] if isinstance(parts, torch.Tensor) else [part.values() for part in parts]
