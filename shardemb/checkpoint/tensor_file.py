"""Tensors in files of the safetensors format, written in a stream and read by ranges.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes
(https://huggingface.co/docs/safetensors), so that other tools read these files too. The library
itself would hold all of a file in memory as bytes; here it goes block by block, with a checksum
each.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping

import torch

from planner import UserError
from shardemb.checkpoint.manifest import FileEntry, TensorEntry
from shardemb.checkpoint.store import Store

BLOCK_BYTES = 8 << 20
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_tensors(
    store: Store, name: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """One file of `tensors`; raises OSError. Memory for one block is all that is needed."""
    header, entries = _layout(name, tensors)
    blocks = _Blocks()
    store.write(name, blocks.through(_bytes_of(header, tensors)))
    file = FileEntry(bytes=blocks.bytes, block_bytes=BLOCK_BYTES, crc32=blocks.crc32)
    return file, entries


def _layout(name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, TensorEntry]]:
    end, starts = 0, {}
    for key, tensor in tensors.items():
        starts[key], end = end, end + tensor.nbytes
    table = {
        key: {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[key], starts[key] + tensor.nbytes],
        }
        for key, tensor in tensors.items()
    }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of eight
    first = 8 + len(text)
    entries = {
        key: TensorEntry(
            file=name,
            start=first + starts[key],
            dtype=_NAMES[tensor.dtype],
            shape=list(tensor.shape),
        )
        for key, tensor in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def _bytes_of(header: bytes, tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), BLOCK_BYTES):
            yield flat[start : start + BLOCK_BYTES].cpu().numpy().data


class _Blocks:
    """Checksums of the blocks of what goes through."""

    def __init__(self) -> None:
        self.crc32: list[int] = []
        self.bytes = 0

    def through(self, parts: Iterator[memoryview]) -> Iterator[memoryview]:
        for part in parts:
            for piece in self._cut(part):
                if self.bytes % BLOCK_BYTES == 0:
                    self.crc32.append(0)
                self.crc32[-1] = zlib.crc32(piece, self.crc32[-1])
                self.bytes += len(piece)
            yield part

    def _cut(self, part: memoryview) -> Iterator[memoryview]:
        """At the ends of blocks."""
        while part:
            room = BLOCK_BYTES - self.bytes % BLOCK_BYTES
            yield part[:room]
            part = part[room:]


class TensorFile:
    """A file of tensors, opened; every block that is read is held against its checksum."""

    def __init__(self, store: Store, name: str, entry: FileEntry) -> None:
        self.path, self._entry = store.path(name), entry
        try:
            self._file = store.open(name)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error})") from error
        self._cached = -1, b""

    def close(self) -> None:
        self._file.close()

    def read(self, start: int, size: int, what: str) -> bytearray:
        """`size` bytes from `start`; UserError names the file and `what` they are if damaged."""
        result = bytearray()
        while len(result) < size:
            number, offset = divmod(start + len(result), self._entry.block_bytes)
            block = self._block(number, what)
            result += memoryview(block)[offset : offset + size - len(result)]
        return result

    def tensor(self, entry: TensorEntry, what: str) -> torch.Tensor:
        """All of a tensor, in new memory."""
        dtype, count = DTYPES[entry.dtype], 1
        for length in entry.shape:
            count *= length
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        data = self.read(entry.start, count * dtype.itemsize, what)
        return torch.frombuffer(data, dtype=dtype).view(entry.shape)

    def verify(self, what: Callable[[int, int], str]) -> None:
        """Read all of it; UserError where a byte is not as it was written. `what` says of which
        tables the bytes from one place to another are."""
        for number in range(len(self._entry.crc32)):
            first = number * self._entry.block_bytes
            self._checked(number, what(first, first + self._entry.block_bytes))
        self._file.seek(self._entry.bytes)
        if self._file.read(1):
            raise UserError(
                f"{self.path} is damaged: it has more than its {self._entry.bytes} bytes"
            )

    def _block(self, number: int, what: str) -> bytes:
        if self._cached[0] != number:
            self._cached = number, self._checked(number, what)
        return self._cached[1]

    def _checked(self, number: int, what: str) -> bytes:
        start = number * self._entry.block_bytes
        size = min(self._entry.block_bytes, self._entry.bytes - start)
        try:
            self._file.seek(start)
            block = self._file.read(size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error})") from error
        if len(block) < size:
            raise UserError(
                f"{self.path} is damaged: it ends at byte {start + len(block)} of "
                f"{self._entry.bytes}, in {what}"
            )
        if zlib.crc32(block) != self._entry.crc32[number]:
            raise UserError(
                f"{self.path} is damaged: bytes {start} to {start + size - 1}, in {what}, are not "
                "those that were written"
            )
        return block
