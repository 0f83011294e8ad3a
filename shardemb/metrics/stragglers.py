"""The rank that the others wait for.

Ranks of a step meet in its exchanges, and the one that comes last waits least. So the wait of the
others for it is what their exchanges take longer than its own, which is the transfer itself.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from shardemb.metrics.stage_clock import StageClock

MATERIAL = 0.1  # of a step


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, and what it costs the others."""

    rank: int
    host: str
    wait_ms: float  # a step, of the other ranks on average
    step_ms: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (host {self.host}) is the slowest: the others wait "
            f"{self.wait_ms:.3g} ms of {self.step_ms:.3g} ms a step for it"
        )


class StragglerWatch:
    """Looks at the steps that `clock` has timed lately."""

    def __init__(self, clock: StageClock) -> None:
        self._clock = clock
        self._hosts: list[str] | None = None

    def find(self) -> Straggler | None:
        """On every rank; None where no rank stands out. A collective, if enough steps are timed."""
        import torch
        import torch.distributed as dist

        recent = self._clock.recent
        if len(recent) != recent.maxlen or dist.get_world_size() == 1:  # it is too early to say
            return None
        if self._hosts is None:
            hosts = [""] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
            self._hosts = hosts
        own = torch.tensor(np.median(recent, axis=0), device=self._clock.device)
        every = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(every, own)
        exchange_ms, step_ms = torch.stack(every).cpu().numpy().T
        return slowest(exchange_ms, step_ms, self._hosts)


def slowest(
    exchange_ms: NDArray[np.float64], step_ms: NDArray[np.float64], hosts: list[str]
) -> Straggler | None:
    """[ranks] each; None where the others wait for less than a material part of the step."""
    rank = int(exchange_ms.argmin())
    wait = float((exchange_ms - exchange_ms[rank]).sum()) / (len(hosts) - 1)
    step = float(step_ms.mean())
    return Straggler(rank, hosts[rank], wait, step) if wait > MATERIAL * step else None
