"""Tables that begin with the vectors of a file, under every plan."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from planner import UserError
from planner.geometry import SHARDING_TYPES
from shardemb.checkpoint.state import weight_pieces
from shardemb.data import vectors_matrix, vectors_parquet, vectors_text
from shardemb.data.pretrained import Pretrained
from shardemb.pretrained_config import PretrainedConfig
from shardemb.warm_start import Filled, fill_pretrained
from tests.distributed.pool import WorkerPool
from tests.distributed.test_checkpoints import make_trainer

ROWS, DIM = 50, 8
WORDS = [f"word {i}" if i % 7 == 0 else f"w{i}" for i in range(ROWS - 1)]  # and a row for others
Floats = NDArray[np.float32]
Held = list[tuple[int, int, torch.Tensor]]

GENERATOR = np.random.default_rng(0)
VECTORS = GENERATOR.normal(size=(40, DIM)).astype(np.float32)
IDS = GENERATOR.permutation(ROWS)[:40]  # in no order


def parquet(path: Path, keys: Any, vectors: Floats, **options: Any) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"id": pa.array(keys), "v": lists}), path, row_group_size=9, **options)


def text(path: Path, keys: Any, header: bool) -> None:
    lines = [f"{len(VECTORS)} {DIM} "] if header else []
    rows = zip(keys, VECTORS, strict=True)
    lines += [f"{key} {' '.join(map(repr, row.tolist()))} " for key, row in rows]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def folder_of_parquet(path: Path) -> None:
    path.mkdir()
    parquet(path / "a.parquet", IDS[:25], VECTORS[:25])
    parquet(path / "b.parquet", IDS[25:].astype(np.uint16), VECTORS[25:])


def write_lists(path: Path) -> None:
    """As pandas and Polars write vectors: lists of any length, of doubles."""
    rows = [row.astype(float).tolist() for row in VECTORS]
    pq.write_table(pa.table({"item": IDS, "n": ["x"] * 40, "v": rows}), path)


def by_word(keys: list[str]) -> list[str]:
    """Those of the ids, and others where the id has none."""
    return [keys[i] if i < len(keys) else f"unknown{i}" for i in IDS]


def in_order(path: Path, dtype: torch.dtype = torch.float32) -> None:
    tensors = {"weight": torch.from_numpy(VECTORS).to(dtype), "bias": torch.zeros(3)}
    safetensors.torch.save_file(tensors, path)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "ids.parquet": (lambda p: parquet(p, IDS, VECTORS), "ids"),
    "sorted.parquet": (lambda p: parquet(p, range(40), VECTORS), "order"),
    "lists.parquet": (write_lists, "ids"),
    "folder": (folder_of_parquet, "ids"),
    "words.parquet": (lambda p: parquet(p, by_word(WORDS), VECTORS), "words"),
    "matrix.npy": (lambda p: np.save(p, VECTORS), "order"),
    "double.npy": (lambda p: np.save(p, VECTORS.astype(">f8")), "order"),
    "matrix.safetensors": (in_order, "order"),
    "bf16.safetensors": (lambda p: in_order(p, torch.bfloat16), "order"),
    "word2vec.txt": (lambda p: text(p, by_word(WORDS), header=True), "words"),
    "glove.txt.gz": (lambda p: text(p, by_word(WORDS), header=False), "words"),
    "ids.vec": (lambda p: text(p, IDS, header=True), "ids"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, (write, _) in FILES.items():
        write(folder / name)
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def table_of(path: Path | str, vocabulary: Path | None = None, **config: Any) -> Pretrained:
    keys = "vocabulary" if vocabulary else "rows"
    section = PretrainedConfig(path=str(path), keys=keys, **config)
    return Pretrained("t", ROWS, DIM, section, str(vocabulary) if vocabulary else None)


def filled(
    sharding_type: str, tables: list[Pretrained], first_row: int
) -> tuple[Held, list[tuple[Filled, Held]]]:
    """What the rank holds of table t before, and after each file is read into a fresh model."""
    for module in (vectors_matrix, vectors_parquet, vectors_text):
        module.BLOCK_BYTES = 100 * DIM * 3  # type: ignore[attr-defined]
    model = make_trainer(sharding_type).model
    before, after = held(model), []
    for table in tables:
        for piece, (_, _, first) in zip(own(model), before, strict=True):
            piece.tensor.data.copy_(first)
        table.check()
        after.append((fill_pretrained(model, table, first_row), held(model)))
    return before, after


def own(model: Any) -> list[Any]:
    return [piece for piece in weight_pieces(model) if piece.table == "t" and piece.rows]


def held(model: Any) -> Held:
    return [(p.row, p.column, p.tensor.detach().clone()) for p in own(model)]


def assembled(ranks: list[Held]) -> Floats:
    whole = np.full((ROWS, DIM), np.nan, np.float32)
    for pieces in ranks:
        for row, column, tensor in pieces:
            rows, columns = tensor.shape
            whole[row : row + rows, column : column + columns] = tensor.numpy()
    assert np.isfinite(whole).all()
    return whole


@pytest.mark.parametrize("first_row", [0, 23])
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
@pytest.mark.shapes((2, 2), (4, 2))
def test_every_format_under_every_plan(
    pool: WorkerPool, files: Path, sharding_type: str, first_row: int
) -> None:
    """Rows that a file has are its vectors to the bit, all others the table's first values; rows
    and unknown keys are counted. From `first_row` on alone, where that is asked for."""
    tables = [
        table_of(
            f"file://{files / name}" if name == "matrix.npy" else files / name,
            files / "words.txt" if how == "words" else None,
        )
        for name, (_, how) in FILES.items()
    ]
    results = pool.run(filled, sharding_type, tables, first_row)
    first = assembled([before for before, _ in results])
    for number, (name, (_, how)) in enumerate(FILES.items()):
        expected = first.copy()
        ids = np.arange(40) if how == "order" else IDS
        unknown = how == "words" and ids >= len(WORDS)
        wanted = (ids >= first_row) & ~np.broadcast_to(unknown, 40)
        vectors = VECTORS
        if name == "bf16.safetensors":
            vectors = torch.from_numpy(VECTORS).bfloat16().float().numpy()
        expected[ids[wanted]] = vectors[wanted]
        found = assembled([after[number][1] for _, after in results])
        assert np.array_equal(found, expected), name
        counts = {after[number][0] for _, after in results}
        assert counts == {Filled(int(wanted.sum()), int(np.sum(unknown)))}, name


def changed(row: int, column: int, value: float) -> Floats:
    vectors = VECTORS.copy()
    vectors[row, column] = value
    return vectors


def cut(path: Path) -> None:
    np.save(path, VECTORS)
    path.write_bytes(path.read_bytes()[:-100])


def twice(ids: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([ids[:-1], ids[:1]])


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "twice.parquet": (
        lambda p: parquet(p, twice(IDS), VECTORS),
        f"twice.parquet, row 39: a second vector for row {IDS[0]} of the table",
    ),
    "outside.parquet": (
        lambda p: parquet(p, [*IDS[:20], 50, *IDS[21:]], VECTORS),
        "outside.parquet, row 20: id 50 is outside the table, whose rows are 0 to 49; raise "
        "tables.t.num_embeddings",
    ),
    "null.parquet": (
        lambda p: parquet(p, pa.array([None, *IDS[1:]]), VECTORS),
        "null.parquet, row 0: column id is null",
    ),
    "nan.parquet": (
        lambda p: parquet(p, IDS, changed(12, 7, np.nan)),
        "nan.parquet, row 12: the vector has a value that is no number",
    ),
    "inf.npy": (
        lambda p: np.save(p, changed(31, 0, np.inf)),
        "inf.npy, row 31: the vector has a value that is no number",
    ),
    "short.parquet": (
        lambda p: pq.write_table(
            pa.table({"id": [1, 2], "v": [[0.0] * DIM, [0.0] * (DIM - 1)]}), p
        ),
        "short.parquet, row 1: a vector of 7, others have 8",
    ),
    "cut.npy": (cut, "cut.npy is damaged: it ends in row 36 of 40"),
    "words.vec": (
        lambda p: text(p, by_word(WORDS), header=False),
        "words.vec, line 1: the key w",
    ),
    "short.vec": (
        lambda p: p.write_text("2 8\n1 1 2 3 4 5 6 7 8\n2 1 2 3\n"),
        "short.vec, line 3: a key and a vector of 8 numbers are needed, found '2 1 2 3'",
    ),
    "few.vec": (
        lambda p: p.write_text("3 8\n1 1 2 3 4 5 6 7 8\n"),
        "few.vec is not whole: its first line says 3 vectors, and 1 follow",
    ),
}


def mistakes(sharding_type: str, tables: list[Pretrained]) -> list[str]:
    model, messages = make_trainer(sharding_type).model, []
    for table in tables:
        table.check()
        with pytest.raises(UserError) as caught:
            fill_pretrained(model, table)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_wise"])
@pytest.mark.shapes((2, 2))
def test_files_that_are_wrong(pool: WorkerPool, tmp_path: Path, sharding_type: str) -> None:
    """What only reading finds is told on all ranks, whichever holds the row, with table, file and
    row."""
    for name, (write, _) in MISTAKES.items():
        write(tmp_path / name)
    tables = [table_of(tmp_path / name) for name in MISTAKES]
    for found in pool.run(mistakes, sharding_type, tables):
        for message, (_, expected) in zip(found, MISTAKES.values(), strict=True):
            assert message.startswith("tables.t.pretrained: ")
            assert expected in message
