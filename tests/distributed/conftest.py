"""Worker pools, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import WorkerPool

# (world_size, local_world_size): the last is two emulated hosts of two ranks each.
SHAPES = [(1, 1), (2, 2), (4, 4), (4, 2)]


@pytest.fixture(scope="session", params=SHAPES, ids=[f"{w}ranks-{w // n}hosts" for w, n in SHAPES])
def started_pool(request: pytest.FixtureRequest) -> Iterator[list[WorkerPool]]:
    holder = [WorkerPool(*request.param)]
    yield holder
    holder[0].close()


@pytest.fixture
def pool(started_pool: list[WorkerPool]) -> WorkerPool:
    """A pool that works, started anew where a test before has broken it."""
    broken = started_pool[0]
    if not broken.is_alive:
        started_pool[0] = WorkerPool(broken.world_size, broken.local_world_size, broken.device)
    return started_pool[0]
