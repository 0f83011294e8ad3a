"""Files of vectors, by their names: Parquet, safetensors, npy, word2vec's and GloVe's text."""

from __future__ import annotations

from planner import UserError
from shardemb.data.sources import has_folder, matches_of
from shardemb.data.vector_blocks import VectorFile
from shardemb.data.vectors_matrix import npy_matrix, safetensors_matrix
from shardemb.data.vectors_parquet import ParquetVectors
from shardemb.data.vectors_text import TextVectors

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
KNOWN = ".parquet, .safetensors, .npy, .txt, .vec, or the last two compressed"


def open_vectors(
    path: str, dim: int, *, text_keys: bool, key_column: str | None, vectors: str | None
) -> VectorFile:
    """The file at `path`, for a table of `dim` columns. UserError where it cannot be used.

    `text_keys`: whether Parquet's keys are to be text, or integers. Columns that are not named are
    found by their types. Raises OSError where the file cannot be read.
    """
    if not matches_of(path):
        raise UserError(f"there is no file {path}")
    kind = _format(path)
    if kind == ".parquet":
        return ParquetVectors(path, text_keys, key_column, vectors)
    for key, value in {"key_column": key_column, "vectors": vectors}.items():
        if value is not None and not (key == "vectors" and kind == ".safetensors"):
            raise UserError(f"{key}: {path} has no columns; leave it out")
    if kind == ".npy":
        return npy_matrix(path)
    return safetensors_matrix(path, vectors) if kind == ".safetensors" else TextVectors(path, dim)


def _format(path: str) -> str:
    plain = path
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    for suffix in (".txt", ".vec"):
        if plain.endswith(suffix):
            return suffix
    for suffix in (".parquet", ".safetensors", ".npy"):
        if path.endswith(suffix):
            return suffix
    if has_folder(path) or any(match.endswith(".parquet") for match in matches_of(path)):
        return ".parquet"
    raise UserError(f"{path} is of no format that is known by its name: {KNOWN}")
