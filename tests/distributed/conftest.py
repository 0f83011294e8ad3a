"""Worker pools, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import WorkerPool

# (world_size, local_world_size): the last is two emulated hosts of two ranks each.
SHAPES = [(1, 1), (2, 2), (4, 4), (4, 2)]


@pytest.fixture(
    scope="session", params=SHAPES, ids=[f"{w}ranks-{w // n}hosts" for w, n in SHAPES]
)
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    workers = WorkerPool(*request.param)
    yield workers
    workers.close()
