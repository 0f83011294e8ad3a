"""Steps hold the same rows however many ranks share them, and every row comes once an epoch,
wherever the run was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb.data.footers
from planner import UserError
from shardemb.data.order import LANES, Part, Schedule, Window, count_lanes, epoch_parts
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema


def make_windows(sizes: list[int]) -> list[Window]:
    return [Window(i, "file", i, 0, rows, 0, True, 8 * rows) for i, rows in enumerate(sizes)]


def rows_of(parts: list[Part]) -> list[tuple[int, int]]:
    return [(part.window.number, row) for part in parts for row in range(part.start, part.stop)]


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    world_size=st.integers(1, 20),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_lanes_hold_every_row_once(
    sizes: list[int], world_size: int, batch_size: int, seed: int, data: st.DataObject
) -> None:
    """For any sizes, ranks and batch: lanes tile the data, ranks tile a step's rows, the steps'
    rows add up, and what is left after some steps is what they did not have."""
    rows = batch_size * world_size
    parts = epoch_parts(make_windows(sizes), seed, epoch=1)
    schedule = Schedule(parts, rows, count_lanes(len(sizes), rows, world_size))
    lanes = [part for lane in range(schedule.num_lanes) for part in schedule.lane(lane)]
    everything = [(g, row) for g, count in enumerate(sizes) for row in range(count)]
    assert sorted(rows_of(lanes)) == everything

    assert sum(schedule.rows_of_step(step) for step in range(schedule.steps)) == sum(sizes)
    assert schedule.rows_of_step(schedule.steps - 1) > 0
    owned = []
    for rank in range(world_size):
        shares = schedule.shares_of_rank(rank, batch_size)
        places = [share.place + i for share in shares for i in range(share.stop - share.start)]
        assert places == list(range(batch_size))
        owned += [(s.lane, i) for s in shares for i in range(s.start, s.stop)]
    assert len(set(owned)) == len(owned) == rows

    step = data.draw(st.integers(0, schedule.steps))
    left = rows_of(schedule.remaining(step))
    assert len(left) == sum(schedule.rows_of_step(s) for s in range(step, schedule.steps))
    assert len(set(left)) == len(left)

    before = [rows_of(schedule.parts_of_step(s)) for s in range(step)]
    assert [len(rows) for rows in before] == [schedule.rows_of_step(s) for s in range(step)]
    assert sorted([row for rows in before for row in rows] + left) == everything


def test_lanes_depend_on_the_data_and_global_batch_alone() -> None:
    """Up to LANES ranks share them; there are never more than row groups or rows of a step."""
    assert {count_lanes(50, 64, ranks) for ranks in (1, 2, 3, 16)} == {LANES}
    assert count_lanes(50, 64, 17) == 2 * LANES
    assert count_lanes(50, 5, 1) == 5
    assert count_lanes(3, 64, 8) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 numbered rows in two files with row groups of different sizes."""
    path = tmp_path_factory.mktemp("numbered")
    lists = pa.array([[i] * (1 + i % 3) for i in range(1000)])
    numbers = pa.table({"label": np.zeros(1000), "number": np.arange(1000), "list": lists})
    pq.write_table(numbers.slice(0, 300), path / "a.parquet", row_group_size=7)
    pq.write_table(numbers.slice(300), path / "b.parquet", row_group_size=41)
    return path


SCHEMA = BatchSchema(label="label", dense=("number",))


def readers(folder: Path, world_size: int, **options: object) -> list[ParquetReader]:
    options = {"batch_size": 48 // world_size, **options}
    return [
        ParquetReader(folder, SCHEMA, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def steps_of(ranks: list[ParquetReader], epoch: int = 2) -> list[list[int]]:
    """The numbers of each step's rows, over all ranks."""
    epochs = [list(reader.epoch(epoch)) for reader in ranks]
    assert {len(steps) for steps in epochs} == {ranks[0].steps_left(epoch)}
    return [
        sorted(int(n) for batch in batches for n in batch.dense[batch.mask > 0, 0])
        for batches in zip(*epochs, strict=True)
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_steps_do_not_depend_on_the_number_of_ranks(folder: Path, shuffle: bool) -> None:
    """1 to 16 ranks with one global batch size train on the same rows in each step."""
    alone = steps_of(readers(folder, 1, shuffle=shuffle, seed=4))
    assert sorted(n for step in alone for n in step) == list(range(1000))
    for world_size in (2, 3, 4, 6, 8, 12, 16):
        assert steps_of(readers(folder, world_size, shuffle=shuffle, seed=4)) == alone
    assert (steps_of(readers(folder, 2, shuffle=shuffle, seed=5)) == alone) is not shuffle


def test_shuffled_steps_mix_the_whole_data_set(folder: Path) -> None:
    """A step's rows come from all over the files, though row groups are read whole."""
    for step in steps_of(readers(folder, 2, shuffle=True, seed=4))[:-1]:
        assert max(step) - min(step) > 500
        assert len({n // 100 for n in step}) >= 6


def test_pieces_of_huge_row_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded and shuffled piece by piece, row groups lose no row; nor do lanes that begin in the
    middle of one."""
    monkeypatch.setattr(shardemb.data.footers, "WINDOW_BYTES", 16 * 10)
    ranks = readers(folder, 3, shuffle=True)
    assert max(window.rows for window in ranks[0].windows) == 10
    assert len(ranks[0].windows) > 100
    alone = steps_of(ranks)
    assert sorted(n for step in alone for n in step) == list(range(1000))
    assert steps_of(readers(folder, 1, shuffle=True)) == alone


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_resumed_epoch_goes_on_as_if_never_stopped(
    folder: Path, shuffle: bool, stop: int
) -> None:
    """Row for row, on any number of ranks with the same global batch; the epochs after it too."""
    never = readers(folder, 2, shuffle=shuffle)
    state = never[0].state(2, stop)
    for world_size in (1, 2, 4):
        resumed = readers(folder, world_size, shuffle=shuffle)
        for reader in resumed:
            reader.resume(state)
        assert resumed[0].first_epoch == 2
        assert steps_of(resumed) == steps_of(never)[stop:]
        assert steps_of(resumed, epoch=3) == steps_of(never, epoch=3)
    batches = [list(reader.epoch(2))[stop:] for reader in never]
    again = readers(folder, 2, shuffle=shuffle)
    for reader, rest in zip(again, batches, strict=True):
        reader.resume(state)
        for one, other in zip(reader.epoch(2), rest, strict=True):
            assert one.dense.tolist() == other.dense.tolist()  # in the same order on each rank


@settings(max_examples=60, deadline=None)
@given(
    shuffle=st.booleans(),
    stops=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(0, 12)), max_size=4
    ),
)
def test_every_row_once_however_often_the_run_was_stopped(
    folder: Path, shuffle: bool, stops: list[tuple[int, int, int]]
) -> None:
    """Each time another number of ranks and another batch size goes on from the state."""
    state, seen = None, []
    for world_size, batch_size, steps in [*stops, (2, 30, 10**6)]:
        ranks = readers(folder, world_size, batch_size=batch_size, shuffle=shuffle)
        for reader in ranks:
            if state is not None:
                reader.resume(state)
        done = steps_of(ranks, epoch=1)[:steps]
        seen += [n for step in done for n in step]
        state = ranks[-1].state(1, len(done))
    assert sorted(seen) == list(range(1000))


def test_other_data_or_another_seed_are_refused(folder: Path, tmp_path: Path) -> None:
    """A state is of no use there: rows would come twice or never."""
    reader = readers(folder, 1, shuffle=True, seed=1)[0]
    state = reader.state(0, 3)
    with pytest.raises(UserError, match="seed .* was 1 and is 2 now"):
        readers(folder, 1, shuffle=True, seed=2)[0].resume(state)
    pq.write_table(pq.read_table(folder / "a.parquet"), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="its training data was 1000 rows.* is 300 rows"):
        readers(tmp_path, 1, shuffle=True, seed=1)[0].resume(state)
    moved, renamed = tmp_path / "moved", tmp_path / "renamed"
    shutil.copytree(folder, moved)
    readers(moved, 1, shuffle=True, seed=1)[0].resume(state)
    shutil.copytree(folder, renamed)
    (renamed / "a.parquet").rename(renamed / "aa.parquet")
    with pytest.raises(UserError, match="its training data was 1000 rows.* is 1000 rows"):
        readers(renamed, 1, shuffle=True, seed=1)[0].resume(state)
