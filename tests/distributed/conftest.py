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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the pools that a test's mark `shapes` does not name."""
    left_out = [item for item in items if not _has_its_shape(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _has_its_shape(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("shapes")
    if mark is None or not isinstance(item, pytest.Function):
        return True
    shape = item.callspec.params.get("started_pool")
    return shape not in SHAPES or shape in mark.args


@pytest.fixture
def pool(started_pool: list[WorkerPool]) -> WorkerPool:
    """A pool that works, started anew where a test before has broken it."""
    broken = started_pool[0]
    if not broken.is_alive:
        started_pool[0] = WorkerPool(broken.world_size, broken.local_world_size, broken.device)
    return started_pool[0]
