"""Files of vectors that cannot be used: told before training, by what the file says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from planner import RequestError, UserError
from shardemb.config import RunConfig
from shardemb.data import vectors_matrix, vectors_parquet, vectors_text
from shardemb.data.pretrained import Pretrained, pretrained_tables
from shardemb.pretrained_config import PretrainedConfig

VECTORS = [[0.5] * 8, [1.5] * 8]


def columns(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def tensors(**shapes: tuple[int, ...]) -> Callable[[Path], None]:
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return lambda path: safetensors.numpy.save_file(arrays, path)


def array(*shape: int, kind: str = "f4", order: Any = "C") -> Callable[[Path], None]:
    return lambda path: np.save(path, np.zeros(shape, kind, order))


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


LINE = " 1" * 8
MISTAKES: list[tuple[str, Callable[[Path], None] | None, dict[str, str], str]] = [
    ("v.npy", None, {}, "there is no file "),
    ("v.bin", text("x"), {}, "v.bin is of no format that is known by its name: .parquet, .safe"),
    ("v.npy", array(3, 12), {}, "v.npy has vectors of 12, the table has embedding_dim 8"),
    ("v.npy", array(6, 8), {}, "v.npy has 6 rows, the table 5; raise tables.t.num_embeddings"),
    ("v.npy", array(8), {}, "v.npy holds float32 of shape [8]; it must be a matrix of floats"),
    ("v.npy", array(3, 8, kind="i4"), {}, "v.npy holds int32 of shape [3, 8]; it must be"),
    ("v.npy", array(3, 8, order="F"), {}, "of shape [3, 8] by columns; it must be a matrix"),
    ("v.npy", text("nothing"), {}, "v.npy is no .npy file of numbers"),
    ("v.npy", array(3, 8), {"key_column": "id"}, "key_column: "),
    ("v.npy", array(3, 8), {"keys": "vocabulary"}, "keys: vocabulary, but "),
    ("v.safetensors", tensors(a=(3, 12)), {}, "has vectors of 12, the table has embedding_dim 8"),
    ("v.safetensors", tensors(a=(3, 8), b=(2, 8)), {}, "has matrices a, b; name one with vectors"),
    ("v.safetensors", tensors(a=(3,)), {}, "v.safetensors has no matrix"),
    ("v.safetensors", tensors(weight=(3, 8)), {"vectors": "wieght"}, "no matrix wieght; did you"),
    ("v.safetensors", text("nothing at all"), {}, "v.safetensors is no safetensors file"),
    ("v.txt", text(f"a{LINE} 1\n"), {}, "v.txt has vectors of 9, the table has embedding_dim 8"),
    ("v.txt", text(f"1 12\na{LINE}\n"), {}, "v.txt has vectors of 12, the table has"),
    ("v.txt", text(""), {}, "v.txt, line 1: a key and a vector"),
    ("v.txt.gz", text(f"a{LINE}\n"), {}, "cannot read "),
    ("v.parquet", text("nothing"), {}, "v.parquet cannot be read"),
    ("v.parquet", columns(v=VECTORS), {}, "has no column of integers; it has v (list<"),
    ("v.parquet", columns(id=[1, 2]), {}, "v.parquet has no column of vectors; it has id (int64)"),
    ("v.parquet", columns(id=["a", "b"], v=VECTORS), {}, "has no column of integers; it has id (s"),
    (
        "v.parquet",
        columns(a=[1, 2], b=[3, 4], v=VECTORS),
        {},
        "v.parquet has columns a, b of integers; name one with key_column",
    ),
    (
        "v.parquet",
        columns(id=[1, 2], v=VECTORS, w=VECTORS),
        {},
        "v.parquet has columns v, w of vectors; name one with vectors",
    ),
    (
        "v.parquet",
        columns(id=[1, 2], vector=VECTORS),
        {"vectors": "vectors"},
        "has no column vectors of vectors; did you mean vector?",
    ),
    ("v.parquet", columns(id=[1], v=[[0.5] * 4]), {}, "has vectors of 4, the table has embedding"),
    ("v.parquet", columns(id=[1], v=VECTORS[:1]), {"keys": "vocabulary"}, "no column of text"),
]


@pytest.mark.parametrize(("name", "write", "options", "message"), MISTAKES)
def test_files_that_cannot_be_used(
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None] | None,
    options: dict[str, Any],
    message: str,
) -> None:
    """Table, file, what was found and what to do."""
    if write:
        write(tmp_path / name)
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    config = PretrainedConfig(path=str(tmp_path / name), **options)
    vocabulary = str(words) if config.keys == "vocabulary" else None
    with pytest.raises(UserError) as caught:
        Pretrained("t", 5, 8, config, vocabulary).check()
    assert str(caught.value).startswith("tables.t.pretrained: ")
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_columns_that_are_named(tmp_path: Path) -> None:
    """Of several that fit those of the config are taken, and else `id`."""
    path = tmp_path / "v.parquet"
    columns(id=[1, 2], b=[3, 4], v=VECTORS, w=[[2.0] * 8, [3.0] * 8])(path)
    for named, rows in [({}, [1, 2]), ({"key_column": "b"}, [3, 4])]:
        config = PretrainedConfig(path=str(path), vectors="w", **named)
        (block,) = Pretrained("t", 5, 8, config).read(lambda rows: True)
        assert block.rows.tolist() == rows
        assert block.vectors is not None
        assert block.vectors[:, 0].tolist() == [2.0, 3.0]


def config(data: Path, **features: Any) -> RunConfig:
    pretrained = {"path": "v.txt", "keys": "vocabulary"}
    table = {"num_embeddings": 5, "embedding_dim": 8, "pretrained": pretrained}
    tables = {"t": {**table, "feature_names": list(features)}}
    section = {"dir": str(data), "features": {k: v for k, v in features.items() if v}}
    return RunConfig.model_validate({"data": section, "tables": tables})


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"f": {}}, "feature f has none, its ids are as_is: name one with data.features.f.vocab"),
        ({"f": {"ids": "hash"}}, "feature f has none, its ids are hash"),
        (
            {f: {"ids": "vocabulary", "vocabulary": f"{f}.txt"} for f in "fg"},
            "the table's features have several: f.txt (of f), g.txt (of g); say keys: rows",
        ),
    ],
)
def test_tables_without_one_vocabulary(
    tmp_path: Path, features: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        pretrained_tables(config(tmp_path, **features))
    assert "tables.t.pretrained.keys: vocabulary, but " in str(caught.value)
    assert message in str(caught.value)


def test_whose_vocabulary_it_is(tmp_path: Path) -> None:
    """The feature's, or that of the data set that its column was converted with."""
    own = {"ids": "vocabulary", "vocabulary": "words.txt"}
    (table,) = pretrained_tables(config(tmp_path, f=own, g=own))
    assert table.vocabulary == "words.txt"
    info = '{"format": "csv", "rows": {}, "label": "y", "dense": [], "sparse": ["c"]'
    sizes = '"vocabularies": {"c": {"size": 4, "oov_rows": 1}}'
    (tmp_path / "dataset.json").write_text(f"{info}, {sizes}}}")
    (table,) = pretrained_tables(config(tmp_path, f={"column": "c"}))
    assert table.vocabulary == f"{tmp_path}/vocabularies/c.parquet"
    with pytest.raises(RequestError):
        pretrained_tables(config(tmp_path, f={"column": "c", "ids": "hash"}))


@pytest.mark.parametrize("place", ["a folder", "memory://vectors"])
@pytest.mark.parametrize("name", ["v.npy", "v.safetensors", "v.parquet", "v.txt"])
def test_no_more_is_read_than_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """A rank with the last rows of a table has their vectors in memory, a few at a time, and no
    others; it sees all rows. From a URL as from a file."""
    for module in (vectors_matrix, vectors_parquet, vectors_text):
        monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 4 * 10)
    vectors = np.arange(100 * 8, dtype=np.float32).reshape(100, 8)
    if name == "v.npy":
        np.save(tmp_path / name, vectors)
    elif name == "v.safetensors":
        safetensors.numpy.save_file({"v": vectors}, tmp_path / name)
    elif name == "v.parquet":
        table = pa.table({"id": range(100), "v": vectors.tolist()})
        pq.write_table(table, tmp_path / name, row_group_size=25)
    else:
        lines = [f"{i} {' '.join(map(str, row))}\n" for i, row in enumerate(vectors)]
        (tmp_path / name).write_text("".join(lines))
    path = str(tmp_path / name)
    if place != "a folder":
        path = f"{place}/{name}"
        fsspec.filesystem("memory").pipe(path, (tmp_path / name).read_bytes())
    table = Pretrained("t", 100, 8, PretrainedConfig(path=path))
    table.check()
    blocks = list(table.read(lambda rows: bool((rows >= 80).any())))
    assert [row for block in blocks for row in block.rows.tolist()] == list(range(100))
    read = [block for block in blocks if block.vectors is not None]
    assert {"v.parquet": 75}.get(name, 80) == min(block.rows.min() for block in read)
    for block in read:
        assert block.vectors is not None
        assert len(block.rows) <= 10
        assert np.array_equal(block.vectors, vectors[block.rows])
