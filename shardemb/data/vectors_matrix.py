"""Matrices in npy and safetensors files: each vector is of the row of its number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from planner import UserError
from planner.validation import nearest
from shardemb.data.sources import first_line, open_file
from shardemb.data.vector_blocks import BLOCK_BYTES, Block, Vectors, Wanted, row_of_file


@dataclass(frozen=True)
class Matrix:
    """One vector after the other from byte `start` on; each is of the row of its number."""

    path: str
    start: int
    dtype: str  # NumPy's; bfloat16 it has not
    rows: int
    dim: int
    has_keys = False

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        size = max(1, BLOCK_BYTES // (4 * self.dim))
        with open_file(self.path) as file:
            for first in range(0, self.rows, size):
                place = row_of_file(self.path, first)
                numbers = pa.array(np.arange(first, min(first + size, self.rows)))
                rows = wanted.rows(numbers, place)
                vectors = self._read(file, first, len(rows)) if wanted.any_of(rows) else None
                yield Block(rows, vectors, place)

    def _read(self, file: IO[bytes], first: int, rows: int) -> Vectors:
        dtype = np.dtype("<u2" if self.dtype == "bfloat16" else self.dtype)
        row_bytes = dtype.itemsize * self.dim
        file.seek(self.start + first * row_bytes)
        data = file.read(rows * row_bytes)
        if len(data) < rows * row_bytes:
            whole = first + len(data) // row_bytes
            raise UserError(f"{self.path} is damaged: it ends in row {whole} of {self.rows}")
        values = np.frombuffer(data, dtype).reshape(rows, self.dim)
        if self.dtype == "bfloat16":  # the upper half of float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


def npy_matrix(path: str) -> Matrix:
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with open_file(path) as file:
        try:
            shape, is_fortran, dtype = headers[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is no .npy file of numbers ({first_line(error)})") from error
        start = file.tell()
    if len(shape) != 2 or dtype.kind != "f" or is_fortran or not all(shape):
        order = " by columns" if is_fortran else ""
        raise UserError(
            f"{path} holds {dtype} of shape {list(shape)}{order}; it must be a matrix of floats, a "
            "row for each row of the table: np.save(path, np.ascontiguousarray(matrix))"
        )
    return Matrix(path, start, dtype.str, shape[0], shape[1])


_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}


def safetensors_header(file: IO[bytes], path: str) -> tuple[dict[str, Any], int]:
    """`dtype`, `shape` and `data_offsets` of each tensor, and where the data begin that these
    count from: https://huggingface.co/docs/safetensors."""
    size = int.from_bytes(file.read(8), "little")
    try:
        if size > 100 << 20:
            raise ValueError(f"a header of {size} bytes")
        header = {k: v for k, v in json.loads(file.read(size)).items() if k != "__metadata__"}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file ({first_line(error)})") from error
    return header, 8 + size


def safetensors_matrix(path: str, name: str | None) -> Matrix:
    with open_file(path) as file:
        header, begin = safetensors_header(file, path)
    fit = [n for n, v in header.items() if v["dtype"] in _SAFETENSORS and len(v["shape"]) == 2]
    if name is None:
        if len(fit) != 1:
            found = f"matrices {', '.join(fit)}; name one with vectors" if fit else "no matrix"
            raise UserError(f"{path} has {found}")
        name = fit[0]
    if name not in fit:
        raise UserError(f"vectors: {path} has no matrix {name}{nearest(name, fit)}")
    found = header[name]
    rows, dim = found["shape"]
    start = begin + found["data_offsets"][0]
    return Matrix(path, start, _SAFETENSORS[found["dtype"]], rows, dim)
