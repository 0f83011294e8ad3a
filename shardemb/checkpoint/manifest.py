"""What a checkpoint holds and where: manifest.json, written when all its files are there."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner import UserError

VERSION = 1  # raised when an older shardemb could not read it
MANIFEST = "manifest.json"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """A file, and a checksum of each block of it."""

    bytes: int = Field(ge=0)
    block_bytes: int = Field(gt=0)
    crc32: list[int]


class TensorEntry(_Entry):
    """Where a tensor's bytes begin, in C order."""

    file: str
    start: int = Field(ge=0)
    dtype: str
    shape: list[int]


class PieceEntry(TensorEntry):
    """A part of a table's weights or optimizer state: [rows, columns], or [rows] where the state
    has one value for these columns of a row."""

    table: str
    state: str
    row: int = Field(ge=0)
    rows: int = Field(ge=0)
    column: int = Field(ge=0)
    columns: int = Field(ge=0)


class TableEntry(_Entry):
    num_embeddings: int
    embedding_dim: int
    dtype: str
    optimizer: str
    parameter: str  # its name in the state_dict of the unsharded model


class Manifest(_Entry):
    """Tables are stored by rows and columns, whatever the plan was that they were trained by."""

    version: Literal[1] = 1
    created: str  # ISO 8601, UTC
    step: int = Field(ge=0)
    samples: int = Field(ge=0)  # rows trained on, over all ranks
    world_size: int = Field(gt=0)
    plan: dict[str, Any]  # that it was trained by
    loader: dict[str, Any] | None  # ParquetReader.state
    tables: dict[str, TableEntry]
    dense_optimizer: str  # of all other parameters
    best: dict[str, Any] | None = None  # BestStep.state, of runs that are evaluated as they train
    weights_only: bool = False  # imported: a run begins with it
    pieces: list[PieceEntry]
    tensors: dict[str, TensorEntry]  # all else: model/..., optimizer/..., random/RANK/...
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        """With its own checksum in the last line."""
        # Without what most runs have not, an older shardemb reads it too.
        unused = {name for name in ("best", "weights_only") if not getattr(self, name)}
        text = self.model_dump_json(indent=1, exclude=unused).encode() + b"\n"
        return text + f"{zlib.crc32(text):08x}\n".encode()


def read_manifest(data: bytes, path: str | Path) -> Manifest:
    """UserError where it is damaged, or of a newer version."""
    text, _, last = data.rstrip(b"\n").rpartition(b"\n")
    text += b"\n"
    if f"{zlib.crc32(text):08x}".encode() != last:
        raise UserError(f"{path} is damaged: its checksum is not the one it was written with")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors()[0]
        if wrong["loc"] == ("version",):
            raise UserError(
                f"{path} has format version {wrong['input']}, and this shardemb reads version "
                f"{VERSION}: use the version of shardemb that wrote it, or a newer one"
            ) from error
        where = ".".join(map(str, wrong["loc"]))
        raise UserError(
            f"{path} is no manifest of a checkpoint ({where}: {wrong['msg']})"
        ) from error
