"""Checkpoints of a run: a folder with one folder for each, and the list of those that are whole.

A checkpoint counts from the moment its name is in the list, which is replaced as one file after
all else is written: whatever ends a run, the list names whole checkpoints only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from planner import UserError
from shardemb.checkpoint.listing import (
    LIST,
    list_of,
    opened,
    read_best,
    read_checkpoint,
    read_names,
)
from shardemb.checkpoint.manifest import MANIFEST, Manifest
from shardemb.checkpoint.match import check_matches
from shardemb.checkpoint.piece import WEIGHT
from shardemb.checkpoint.reshard import SavedTables
from shardemb.checkpoint.snapshot import RankFile, Snapshot, Stage
from shardemb.checkpoint.state import (
    set_dense,
    set_dense_states,
    set_random,
    set_table_steps,
    table_pieces,
)
from shardemb.checkpoint.store import Store

if TYPE_CHECKING:
    from shardemb.trainer import Trainer

T = TypeVar("T")
BEST = "best"


class Checkpoints:
    """Those in `folder`, a path or a URL of any filesystem that Arrow or fsspec knows.

    Every rank makes one and calls the same methods. Each rank writes what it holds; tables are
    stored by rows and columns, so that they load under any plan and number of ranks.

    With `asynchronous`, `save` copies this rank's state and a thread writes the copy while training
    goes on. Without, it is written from where it lies, which needs no memory and stops training.
    One checkpoint of a process is written at a time. With `keep_best` the one of the step with the
    best evaluation stays beside the last ones.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: bool = False,
        asynchronous: bool = True,
    ) -> None:
        self.store, self.keep_last, self.keep_best = Store(folder), keep_last, keep_best
        self._rank = dist.get_rank()
        self._group = _own_group() if dist.get_world_size() > 1 else None
        self._stage = Stage() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.names: list[str] | None = None  # oldest first; None until they are looked for
        self.best: str | None = None  # of names

    def find(self) -> list[str]:
        """Names of the whole checkpoints there are, oldest first."""
        self.names, self.best = self._agree(lambda: (read_names(self.store), read_best(self.store)))
        return self.names

    def refuse_earlier(self, names: list[str]) -> None:
        """UserError where a run that does not go on finds the checkpoints of another."""
        if names:
            raise UserError(
                f"{self.store.root} holds checkpoints of an earlier run, the last is {names[-1]}: "
                "go on there with checkpoint.resume=latest, or choose another checkpoint.dir"
            )

    # --- Save

    def prepare(self, trainer: Trainer) -> None:
        """Take the memory that `save` copies to, before training: new memory is slow to fill."""
        if self._stage:
            self._stage.hold(Snapshot.of(trainer, None).tensors)

    def save(
        self,
        trainer: Trainer,
        loader: dict[str, Any] | None = None,
        *,
        trains_on: bool = True,
    ) -> None:
        """Begin to save what `trainer` is after its last step, and `loader`, the reader's state.

        Without more training (`trains_on`) it is not copied: that would take memory for nothing.
        Waits for the checkpoint before, and raises what went wrong with it: UserError.
        """
        self.wait()
        if self.names is None:
            self.refuse_earlier(self.find())
        snapshot = Snapshot.of(trainer, loader)
        if snapshot.name in (self.names or []):
            return
        if self._stage is None or not trains_on:
            self._write(snapshot)
        else:
            copied = self._stage.copy_of(snapshot)
            self._thread = threading.Thread(target=self._write_in_thread, args=[copied])
            self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is whole; UserError where it could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        def clear() -> None:
            if self._rank == 0:
                self.store.delete_folder(snapshot.name)

        self._together(clear)
        try:
            files = self._together(lambda: snapshot.write(self.store))
            self._together(lambda: self._commit(snapshot, files))
        except UserError:
            with suppress(OSError):
                clear()
            raise
        self.names, self.best = self._kept(snapshot)

    def _kept(self, snapshot: Snapshot) -> tuple[list[str], str | None]:
        """The names there will be, and the best of them."""
        names = [*(self.names or []), snapshot.name]
        best = snapshot.name if self.keep_best and snapshot.is_best else self.best
        last = names[-self.keep_last :]
        return [name for name in names if name in last or name == best], best

    def _commit(self, snapshot: Snapshot, files: list[RankFile]) -> None:
        if self._rank != 0:
            return
        for file in files:  # FileNotFoundError where hosts have folders of their own
            self.store.open(file.name).close()
        manifest = snapshot.manifest(files)
        self.store.write(f"{snapshot.name}/{MANIFEST}", [manifest.to_bytes()])
        kept, best = self._kept(snapshot)
        self.store.write(LIST, [list_of(kept, best)])
        for name in self.store.folders():
            if name.startswith("step-") and name not in kept:
                self.store.delete_folder(name)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank; UserError on all where it failed on one."""
        result: tuple[T | None, str | None]
        try:
            result = work(), None
        except OSError as error:
            result = None, error.strerror or str(error)
        results = self._gather(result)
        for rank, (_, problem) in enumerate(results):
            if problem:
                raise UserError(
                    f"cannot write a checkpoint to {self.store.root} (rank {rank}: {problem}); "
                    "make room there, or name another place with checkpoint.dir; "
                    f"{self.last_good()}"
                )
        return [value for value, _ in results]

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _agree(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, or fails with, on every rank."""
        found: list[Any] = [None]
        if self._rank == 0:
            try:
                found = [find()]
            except UserError as error:
                found = [error]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def last_good(self) -> str:
        """For a message: the newest checkpoint that can be gone on from."""
        if not self.names:
            return "there is no checkpoint yet"
        return f"the last good one is {self.store.path(self.names[-1])}"

    # --- Load

    def load(
        self,
        trainer: Trainer,
        name: str | None = None,
        *,
        weights_only: bool = False,
        grow_tables: bool = False,
    ) -> Manifest:
        """Bring `trainer` to where the newest checkpoint, or that of a name or `best`, was taken.

        `weights_only`: not the optimizers, random states and counts of steps. `grow_tables`: tables
        may have more rows than there; new rows keep the weights that they have, with an optimizer
        state of zero. UserError lists how the model differs from the checkpoint's, or names what is
        damaged.
        """
        names = self.find()
        if name is None and not names:
            raise UserError(f"there is no checkpoint in {self.store.root}")
        name = self._name_of_best() if name == BEST else name or names[-1]
        with self._offering_another(name):
            manifest = read_checkpoint(self.store, name)
            weights_only |= manifest.weights_only
            check_matches(
                manifest,
                trainer,
                self.store.path(name),
                weights_only=weights_only,
                grow_tables=grow_tables,
            )
            rows = {spec.name: spec.num_embeddings for spec in trainer.model.table_specs}
            has_grown = any(rows[n] != table.num_embeddings for n, table in manifest.tables.items())
            with opened(self.store, manifest) as files:
                saved = SavedTables(manifest.pieces)
                for piece in table_pieces(trainer.model, trainer.optimizer):
                    if piece.state != WEIGHT and weights_only:
                        continue
                    old = piece.before(manifest.tables[piece.table].num_embeddings)
                    saved.fill(old, files)
                    if piece.state != WEIGHT:
                        piece.tensor[old.rows :].zero_()
                tensors = {
                    key: files[entry.file].tensor(entry, key)
                    for key, entry in manifest.tensors.items()
                }
            set_dense(trainer.model, tensors)
            if not weights_only:
                set_dense_states(trainer.optimizer, tensors)
                set_random(trainer.device, tensors)
                trainer.freezing.load(tensors)
                steps = trainer.freezing.trained_steps(manifest.step)
                set_table_steps(trainer.model, trainer.optimizer, steps)
                trainer.step, trainer.samples = manifest.step, manifest.samples
                if trainer.best and manifest.best and not has_grown:
                    trainer.best.resume(manifest.best)
        if name in names:  # the next save drops those after it: another past than this one's
            self.names = names[: names.index(name) + 1]
            # Which step is the best of a smaller model says nothing of this one.
            self.best = self.best if self.best in self.names and not has_grown else None
        return manifest

    def _name_of_best(self) -> str:
        if self.best is None:
            raise UserError(
                f"none of the checkpoints in {self.store.root} is marked as the best: they are "
                "where a run had checkpoint.keep_best, or evaluation.early_stopping.restore_best"
            )
        return self.best

    @contextmanager
    def _offering_another(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            names = self.names or []
            earlier = names[: names.index(name)] if name in names else names
            offer = (
                f"the checkpoint before it is {earlier[-1]}: go on there with "
                f"checkpoint.resume={earlier[-1]}"
                if earlier
                else "there is no earlier one"
            )
            raise UserError(f"{error}\n{offer}") from error


_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _own_group() -> dist.ProcessGroup:
    """A group on CPU: collectives of the writing thread must not mix with training's. One for all
    checkpoints of a process, because a group keeps its threads until the process ends."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo")
    return _groups[world]
