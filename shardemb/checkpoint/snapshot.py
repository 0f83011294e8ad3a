"""What one rank writes of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from planner import Plan, TableSpec
from shardemb.checkpoint.manifest import (
    FileEntry,
    Manifest,
    PieceEntry,
    TableEntry,
    TensorEntry,
)
from shardemb.checkpoint.piece import Piece
from shardemb.checkpoint.state import (
    dense_tensors,
    parameter_names,
    random_tensors,
    table_pieces,
)
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import write_tensors

if TYPE_CHECKING:
    from shardemb.trainer import Trainer


class RankFile(NamedTuple):
    """A rank's file, written."""

    name: str
    entry: FileEntry
    pieces: list[PieceEntry]
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the state after a step: `tensors` by their names in the file, which are
    `pieces` of tables and all else."""

    step: int
    samples: int
    plan: Plan
    specs: tuple[TableSpec, ...]
    parameters: dict[str, str]  # table -> its name in the state_dict
    dense_optimizer: str
    loader: dict[str, Any] | None
    best: dict[str, Any] | None
    pieces: dict[str, Piece]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, trainer: Trainer, loader: dict[str, Any] | None) -> Snapshot:
        """The state itself, not a copy; what all ranks hold alike is in one rank's part."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        parts = (
            piece.part_of_rank(rank, world_size)
            for piece in table_pieces(trainer.model, trainer.optimizer)
        )
        pieces = {part.key: part for part in parts if part.rows}
        others = random_tensors(trainer.device)
        if rank == 0:
            others |= dense_tensors(trainer.model, trainer.optimizer)
            others |= trainer.freezing.tensors()
        return cls(
            step=trainer.step,
            samples=trainer.samples,
            plan=trainer.model.planner_plan,
            specs=trainer.model.table_specs,
            parameters=parameter_names(trainer.model),
            dense_optimizer=trainer.dense_optimizer.name,
            loader=loader,
            best=trainer.best.state() if trainer.best else None,
            pieces=pieces,
            tensors={key: piece.tensor for key, piece in pieces.items()} | others,
        )

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"

    @property
    def is_best(self) -> bool:
        """Whether its step has the best evaluation so far."""
        return self.best is not None and self.best["step"] == self.step

    def write(self, store: Store) -> RankFile:
        """Raises OSError."""
        name = f"{self.name}/rank-{dist.get_rank():05d}.safetensors"
        file, entries = write_tensors(store, name, self.tensors)
        pieces = [
            PieceEntry(
                **entries.pop(key).model_dump(),
                table=piece.table,
                state=piece.state,
                row=piece.row,
                rows=piece.rows,
                column=piece.column,
                columns=piece.columns,
            )
            for key, piece in self.pieces.items()
        ]
        return RankFile(name, file, pieces, entries)

    def manifest(self, files: list[RankFile]) -> Manifest:
        return Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            step=self.step,
            samples=self.samples,
            world_size=len(files),
            plan=self.plan.model_dump(mode="json"),
            loader=self.loader,
            tables={
                spec.name: TableEntry(
                    num_embeddings=spec.num_embeddings,
                    embedding_dim=spec.embedding_dim,
                    dtype=spec.dtype,
                    optimizer=spec.optimizer,
                    parameter=self.parameters[spec.name],
                )
                for spec in self.specs
            },
            dense_optimizer=self.dense_optimizer,
            best=self.best,
            pieces=[piece for file in files for piece in file.pieces],
            tensors={key: entry for file in files for key, entry in file.tensors.items()},
            files={file.name: file.entry for file in files},
        )


class Stage:
    """Host memory for a copy of a rank's state, kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def hold(self, tensors: dict[str, torch.Tensor]) -> None:
        """Have memory for these, with all its pages."""
        for key, tensor in tensors.items():
            held = self._buffers.get(key)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                self._buffers[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                ).fill_(0)
        for key in self._buffers.keys() - tensors.keys():
            del self._buffers[key]

    def copy_of(self, snapshot: Snapshot) -> Snapshot:
        """Valid until the next call."""
        self.hold(snapshot.tensors)
        for key, tensor in snapshot.tensors.items():
            self._buffers[key].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(snapshot, tensors=dict(self._buffers))
