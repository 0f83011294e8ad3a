"""Parquet files to batches: each rank decodes the row groups that its rows are in."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from planner import UserError
from shardemb.data.assembly import Assembler, Portion
from shardemb.data.batch import Batch
from shardemb.data.columns import Piece
from shardemb.data.decode import Decoder, OpenFiles
from shardemb.data.footers import read_windows
from shardemb.data.ids import check_vocabularies
from shardemb.data.order import (
    Part,
    Schedule,
    Segment,
    Share,
    Window,
    count_lanes,
    epoch_parts,
    rows_in_order,
)
from shardemb.data.prefetch import prefetch
from shardemb.data.schema import BatchSchema
from shardemb.data.sources import parquet_files

# Steps whose batches are made together have at most about so many bytes, and rows of a rank.
BLOCK_BYTES, BLOCK_ROWS = 48 << 20, 1 << 17
READY_BATCHES = 4  # wait for the trainer at most


class ParquetReader:
    """The batches of one rank, in an order that depends on `seed` and the epoch alone.

    `data` is a folder of Parquet files, or the files; `rank` and `world_size` are those of the
    process group where they are not given.

    What a step is trained on does not depend on the number of ranks (see `order`). Every rank makes
    the same number of steps: where one has no rows left its batches are padding, so no rank waits
    for another and no row is dropped. How many rows a step has on all ranks follows from the files'
    footers, without communication.

    Batches are made in a thread of their own, a few ahead.

    With `skip_damaged`, row groups that cannot be decoded are left out: their rows are padding, in
    `skipped` is what they were. What was left out is known to the rank that reads it alone, so that
    ranks count the rows of each step together then.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        schema: BatchSchema,
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        skip_damaged: bool = False,
    ) -> None:
        files = parquet_files(data) if isinstance(data, str | Path) else list(data)
        self.schema = schema
        self.batch_size = batch_size
        self.rank = _rank() if rank is None else rank
        self.world_size = _world_size() if world_size is None else world_size
        self.seed = seed if shuffle else None
        check_vocabularies(schema)
        self.windows = read_windows(files, schema)
        self.skipped: dict[Window, str] = {}
        self._on_damage = self._note_damage if skip_damaged else None
        self._resumed: tuple[int, tuple[Segment, ...]] = 0, ()

    @property
    def rows_per_epoch(self) -> int:
        """Rows of data in an epoch, over all ranks."""
        return sum(window.rows for window in self.windows)

    @property
    def steps_per_epoch(self) -> int:
        return self._new_schedule(epoch_parts(self.windows, self.seed, 0)).steps

    def steps_left(self, epoch: int) -> int:
        """Steps of `epoch`, without those before the state that was resumed."""
        schedule, done, _ = self._stand(epoch)
        return schedule.steps - done

    @property
    def first_epoch(self) -> int:
        """0, or the epoch of the state that was resumed."""
        return self._resumed[0]

    def epoch(self, epoch: int = 0) -> Generator[Batch, None, None]:
        """`steps_left(epoch)` batches. With `skip_damaged` all ranks must take each together."""
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        batches = prefetch(self._blocks(epoch, gpu), READY_BATCHES)
        return batches if self._on_damage is None else self._counted(batches)

    def _counted(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """With the rows that are there; a collective for each, where ranks are the group's."""
        with closing(batches):
            for batch in batches:
                rows = batch.mask.sum(dtype=torch.int64)
                if 1 < self.world_size == _world_size():
                    rows = rows.to(_device_of_collectives())
                    dist.all_reduce(rows)
                yield replace(batch, global_rows=int(rows))

    # --- Where an epoch stands

    def state(self, epoch: int, steps: int) -> dict[str, Any]:
        """After `steps` batches of `self.epoch(epoch)`: what `resume` needs, as plain JSON."""
        schedule, done, segments = self._stand(epoch)
        now = Segment(schedule.global_batch_size, schedule.num_lanes, done + steps)
        return {
            "epoch": epoch,
            "segments": [vars(segment) for segment in (*segments, now) if segment.steps],
            "seed": self.seed,
            "data": self._fingerprint(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with any number of ranks and any batch size.

        Every row of the epoch that was not read by then will be, once; with the same global batch
        size in the steps that would have come. UserError where the data are others.
        """
        for key, found in (("data", self._fingerprint()), ("seed", self.seed)):
            if state[key] != found:
                raise UserError(
                    f"the run cannot go on where it stopped: its {_NAMES[key]} was {state[key]} "
                    f"and is {found} now; go on with the same, or start anew"
                )
        segments = tuple(Segment(**segment) for segment in state["segments"])
        self._resumed = state["epoch"], segments

    def sources(self, epoch: int, step: int) -> list[str]:
        """Where the rows of a batch over all ranks are, of the `step`th of `self.epoch(epoch)`."""
        schedule, done, _ = self._stand(epoch)
        parts = schedule.parts_of_step(done + step - 1)
        if self.seed is not None:
            groups = {(part.window.file, part.window.row_group) for part in parts}
            return [f"{file}, row group {group}" for file, group in sorted(groups)]
        firsts = [part.window.first_row + part.start for part in parts]
        return [
            f"{part.window.file}, rows {first} to {first + part.rows - 1}"
            for first, part in zip(firsts, parts, strict=True)
        ]

    def _fingerprint(self) -> str:
        """Of the names of the files, wherever they are, and the rows of their row groups."""
        windows = [(Path(w.file).name, w.row_group, w.rows) for w in self.windows]
        digest = hashlib.blake2b(repr(windows).encode(), digest_size=8).hexdigest()
        return f"{self.rows_per_epoch} rows, {digest}"

    def _stand(self, epoch: int) -> tuple[Schedule, int, tuple[Segment, ...]]:
        """The schedule of an epoch, how many of its steps are done, and what was done before."""
        parts = epoch_parts(self.windows, self.seed, epoch)
        segments = self._resumed[1] if epoch == self._resumed[0] else ()
        for number, segment in enumerate(segments):
            schedule = Schedule(parts, segment.global_batch_size, segment.num_lanes)
            if number == len(segments) - 1 and self._goes_on(schedule):
                return schedule, segment.steps, segments[:number]
            parts = schedule.remaining(segment.steps)
        return self._new_schedule(parts), 0, segments

    def _goes_on(self, schedule: Schedule) -> bool:
        new = self._new_schedule(schedule.parts)
        return (new.global_batch_size, new.num_lanes) == (
            schedule.global_batch_size,
            schedule.num_lanes,
        )

    def _new_schedule(self, parts: Sequence[Part]) -> Schedule:
        rows = self.batch_size * self.world_size
        return Schedule(parts, rows, count_lanes(len(parts), rows, self.world_size))

    # --- Batches

    def _blocks(self, epoch: int, gpu: int | None) -> Iterator[Batch]:
        if gpu is not None:  # or pinned memory would take a context on the first GPU too
            torch.cuda.set_device(gpu)
        schedule, done, _ = self._stand(epoch)
        assembler = Assembler(
            self.schema,
            self.batch_size,
            schedule.global_batch_size,
            pin_memory=gpu is not None,
        )
        is_even = True
        with OpenFiles() as files:
            lanes = partial(self._lanes, schedule, epoch, files)
            open_lanes, steps = lanes(done), self._steps_of_block()
            for first in range(done, schedule.steps, steps):
                last = min(first + steps, schedule.steps)
                block = [schedule.rows_of_step(step) for step in range(first, last)]
                if is_even and min(block) == schedule.global_batch_size:
                    batches = assembler.even(_portions(open_lanes, len(block)), len(block))
                    if batches is not None:
                        yield from batches
                        continue
                    is_even, open_lanes = False, lanes(first)
                yield from assembler.uneven(_portions(open_lanes, len(block)), block)

    def _lanes(self, schedule: Schedule, epoch: int, files: OpenFiles, step: int) -> list[_Lane]:
        """This rank's, from `step` on."""
        lanes = []
        for share in schedule.shares_of_rank(self.rank, self.batch_size):
            decoder, parts = self._decoder(files), schedule.lane(share.lane, step)
            lanes.append(_Lane(share, parts, decoder, self.seed, epoch))
        return lanes

    def _decoder(self, files: OpenFiles) -> Decoder:
        return Decoder(self.schema, files, self._on_damage)

    def _note_damage(self, window: Window, damage: UserError) -> None:
        if window not in self.skipped:
            self.skipped[window] = str(damage)
            print(f"left out {window.rows} rows: {damage}", file=sys.stderr, flush=True)

    def _steps_of_block(self) -> int:
        """A power of two, so that row groups end where blocks do, if they can."""
        bytes_of_row = sum(window.bytes for window in self.windows) / self.rows_per_epoch
        most = min(BLOCK_BYTES / bytes_of_row, BLOCK_ROWS) / self.batch_size
        return int(2 ** max(0, np.floor(np.log2(most))))


_NAMES = {"data": "training data", "seed": "seed (none: not shuffled)"}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device_of_collectives() -> torch.device:
    is_nccl = dist.get_backend() == dist.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _portions(lanes: Sequence[_Lane], steps: int) -> Iterator[Portion]:
    for lane in lanes:
        yield from lane.take(steps)


class _Lane:
    """The rows of a lane, taken some steps at a time."""

    def __init__(
        self, share: Share, parts: Sequence[Part], decoder: Decoder, seed: int | None, epoch: int
    ) -> None:
        self._share, self._decoder = share, decoder
        self._order = seed, epoch
        self._parts = iter(parts)
        self._part: Part | None = None
        self._piece: Piece | None = None

    def take(self, steps: int) -> Iterator[Portion]:
        """The rows of the next `steps` steps; fewer where the lane ends."""
        wanted, first = steps * self._share.size, 0
        while first < wanted and (part := self._next()):
            now = Part(part.window, part.start, min(part.stop, part.start + wanted - first))
            order = rows_in_order(now, *self._order)
            piece, rest = self._piece, Part(part.window, now.stop, part.stop)
            if rest.rows:
                self._part = rest
            else:  # its memory goes to the next one while it is in the CPU's cache
                self._part = self._piece = None
            yield Portion(self._share, piece, order, first, now.rows)
            piece = None
            first += now.rows

    def _next(self) -> Part | None:
        if self._part is None:
            self._part = next(self._parts, None)
            self._piece = self._decoder.read(self._part.window) if self._part else None
        return self._part
