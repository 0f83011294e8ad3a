"""Steps hold the same rows however many ranks share them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardemb.data.columns import BatchSchema
from shardemb.data.order import LANES, OPEN_ROWS, RowGroup, Schedule
from shardemb.data.parquet import ParquetReader


def make_groups(sizes: list[int]) -> list[RowGroup]:
    return [RowGroup(Path("file"), index, 0, rows) for index, rows in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    world_size=st.integers(1, 20),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_lanes_hold_every_row_once(
    sizes: list[int], world_size: int, batch_size: int, seed: int
) -> None:
    """For any sizes, ranks and batch: lanes tile the data, ranks tile the lanes, the steps' rows
    add up, and no rank's step has more rows than its batch."""
    schedule = Schedule(make_groups(sizes), batch_size, world_size)
    order = np.random.default_rng(seed).permutation(len(sizes))
    lanes = [lane for rank in range(world_size) for lane in schedule.lanes_of_rank(rank)]
    assert lanes == list(range(schedule.num_lanes))
    read = [
        (part.group.index, row)
        for lane in lanes
        for part in schedule.parts_of_lane(lane, order)
        for row in range(part.start, part.stop)
    ]
    assert sorted(read) == [(g, row) for g, rows in enumerate(sizes) for row in range(rows)]
    assert sum(schedule.rows_of_step(step) for step in range(schedule.steps)) == sum(sizes)
    assert schedule.rows_of_step(schedule.steps - 1) > 0
    for rank in range(world_size):
        assert sum(schedule.shares[lane] for lane in schedule.lanes_of_rank(rank)) == batch_size


def test_lanes_depend_on_the_data_and_global_batch_alone() -> None:
    """Ranks that divide the lanes share them; huge row groups and small batches have fewer."""
    groups = make_groups([100] * 50)
    assert {Schedule(groups, 64 // ranks, ranks).num_lanes for ranks in (1, 2, 4, 8, 16)} == {LANES}
    assert Schedule(groups, 21, 3).num_lanes == 3
    huge = make_groups([OPEN_ROWS // 4] * 8)
    assert {Schedule(huge, 64 // ranks, ranks).num_lanes for ranks in (1, 2, 4)} == {4}
    assert Schedule(groups, 20, 1).num_lanes == 4  # equal shares
    assert Schedule(make_groups([10, 10, 10]), 64, 1).num_lanes == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 numbered rows in two files with row groups of different sizes."""
    path = tmp_path_factory.mktemp("numbered")
    numbers = pa.table({"label": np.zeros(1000), "number": np.arange(1000)})
    pq.write_table(numbers.slice(0, 300), path / "a.parquet", row_group_size=7)
    pq.write_table(numbers.slice(300), path / "b.parquet", row_group_size=41)
    return path


def steps(folder: Path, world_size: int, **options: object) -> list[list[int]]:
    """The numbers of each step's rows, over all ranks."""
    schema = BatchSchema(label="label", dense=("number",))
    readers = [
        ParquetReader(
            folder, schema, batch_size=48 // world_size, rank=rank, world_size=world_size, **options
        )
        for rank in range(world_size)
    ]
    epochs = [list(reader.epoch(2)) for reader in readers]
    return [
        sorted(int(n) for batch in ranks for n in batch.dense[batch.mask > 0, 0])
        for ranks in zip(*epochs, strict=True)
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_steps_do_not_depend_on_the_number_of_ranks(folder: Path, shuffle: bool) -> None:
    """1, 2, 4, 8 and 16 ranks with one global batch size train on the same rows in each step."""
    alone = steps(folder, 1, shuffle=shuffle, seed=4)
    assert sorted(n for step in alone for n in step) == list(range(1000))
    for world_size in (2, 4, 8, 16):
        assert steps(folder, world_size, shuffle=shuffle, seed=4) == alone
    assert (steps(folder, 2, shuffle=shuffle, seed=5) == alone) is not shuffle


def test_shuffled_steps_mix_the_whole_data_set(folder: Path) -> None:
    """A step's rows come from all over the files, though row groups are read whole."""
    for step in steps(folder, 2, shuffle=True, seed=4)[:-1]:
        assert max(step) - min(step) > 500
        assert len({n // 100 for n in step}) >= 6
