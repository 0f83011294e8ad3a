"""Places to train: CUDA devices, and one CPU rank, so that no test is code that never runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from tests.distributed.conftest import pool  # noqa: F401 (a fixture)
from tests.distributed.pool import DeviceType, WorkerPool


class Place(NamedTuple):
    device: DeviceType
    world_size: int


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(Place("cpu", 1), id="cpu"),
        pytest.param(Place("cuda", 1), id="1-gpu", marks=pytest.mark.gpu),
        pytest.param(Place("cuda", 2), id="2-gpus", marks=pytest.mark.gpu),
    ],
)
def place(request: pytest.FixtureRequest) -> Place:
    wanted: Place = request.param
    found = torch.cuda.device_count()
    if wanted.device == "cuda" and found == 0:
        pytest.skip("no CUDA device")
    if wanted.device == "cuda" and found < wanted.world_size:
        pytest.skip(f"{wanted.world_size} CUDA devices are needed, there is {found}")
    return wanted


@pytest.fixture(scope="session")
def started_pool(place: Place) -> Iterator[list[WorkerPool]]:
    holder = [WorkerPool(place.world_size, device=place.device)]
    yield holder
    holder[0].close()
