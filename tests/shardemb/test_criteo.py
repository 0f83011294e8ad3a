from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner.errors import RequestError, UserError
from shardemb.data import criteo
from shardemb.data.criteo import COLUMNS, DENSE, SPARSE, convert_criteo
from shardemb.data.dataset import read_info
from tests.shardemb.splits import split_files

RAW, HASHED = "criteo/criteo_raw_8k.tsv.gz", "criteo/criteo_80k.tsv.gz"


def _parse(text: str, base: int = 16) -> list[list[int | None]]:
    """The file's meaning in plain Python, independent of the converter."""
    bases = [10] * 14 + [base] * 26
    return [
        [int(v, b) if v else None for v, b in zip(line.split("\t"), bases, strict=True)]
        for line in text.splitlines()
    ]


def _read(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in split_files(folder, split)])


def _rows(folder: Path, split: str) -> list[tuple[Any, ...]]:
    table = _read(folder, split)
    return list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def _line(label: str = "0", **values: str) -> str:
    fields = {"label": label}
    fields |= dict.fromkeys(DENSE, "") | dict.fromkeys(SPARSE, "ab12") | values
    return "\t".join(fields[name] for name in COLUMNS)


def _write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("name", "test_rows"), [(RAW, 1000), (HASHED, 20000)])
def test_real_files_come_through_unchanged(
    shared_data: Path, tmp_path: Path, name: str, test_rows: int
):
    """Every value of both real files equals Python's own int(text, 16), nulls and order kept;
    the last rows, and only they, are the test split."""
    source, out = shared_data / name, tmp_path / "data"
    info = convert_criteo(source, out, test_rows=test_rows)
    expected = [tuple(row) for row in _parse(gzip.decompress(source.read_bytes()).decode())]
    cut = len(expected) - test_rows
    assert info.rows == {"train": cut, "test": test_rows} and read_info(out) == info
    assert _rows(out, "train") == expected[:cut]
    assert _rows(out, "test") == expected[cut:]


def test_schema_and_row_groups(shared_data: Path, tmp_path: Path):
    """Columns have the reader's types, and each split's row groups the size asked for."""
    out = tmp_path / "data"
    convert_criteo(shared_data / RAW, out, test_rows=1000, row_group_rows=300)
    metadata = pq.ParquetFile(split_files(out, "test")[0]).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    schema = _read(out, "train").schema
    types = [pa.int8()] + [pa.int32()] * 13 + [pa.int64()] * 26
    assert sizes == [300, 300, 300, 100]
    assert schema == pa.schema(list(zip(COLUMNS, types, strict=True)))


def test_small_blocks_change_nothing(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lines across the edges of what is read at a time are put together again."""
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 1009)
    text = gzip.decompress((shared_data / RAW).read_bytes()).decode()
    lines = text.splitlines()[:200]
    source = _write(tmp_path / "small.tsv", lines)
    seen: list[int] = []
    convert_criteo(source, tmp_path / "data", test_rows=7, on_progress=seen.append)
    rows = _rows(tmp_path / "data", "train") + _rows(tmp_path / "data", "test")
    assert rows == [tuple(row) for row in _parse("\n".join(lines))]
    assert len(seen) > 10 and seen == sorted(seen) and seen[-1] == 200


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_ends_of_lines(tmp_path: Path, end: str):
    """The last line may lack its end, and lines may end as they do on Windows."""
    lines = [_line("1", I1="5"), _line("0", I1="-2", C3="FFffFFff"), _line("0", C26="")]
    text = (end or "\n").join(lines) + end
    source = tmp_path / "data.tsv"
    source.write_bytes(text.encode())
    convert_criteo(source, tmp_path / "data")
    assert _rows(tmp_path / "data", "train") == [tuple(r) for r in _parse("\n".join(lines))]
    assert not (tmp_path / "data" / "test").exists()


def test_decimal_categoricals(tmp_path: Path):
    """With `int` the same text means another number, over the whole range of 64 bits."""
    lines = [_line(**dict.fromkeys(SPARSE, "12")), _line(**dict.fromkeys(SPARSE, str(2**63 - 1)))]
    convert_criteo(_write(tmp_path / "d.tsv", lines), tmp_path / "data", categoricals="int")
    assert _rows(tmp_path / "data", "train") == [tuple(r) for r in _parse("\n".join(lines), 10)]


def test_hexadecimal_of_any_length(tmp_path: Path):
    """One to eight digits of either case, leading zeros too, denote what Python says."""
    generator = random.Random(0)
    lines = [
        _line(
            **{
                name: "".join(
                    generator.choices("0123456789abcdefABCDEF", k=generator.randint(1, 8))
                )
                for name in SPARSE
            }
        )
        for _ in range(500)
    ]
    convert_criteo(_write(tmp_path / "d.tsv", lines), tmp_path / "data")
    assert _rows(tmp_path / "data", "train") == [tuple(r) for r in _parse("\n".join(lines))]


MISTAKES = [
    (_line() + "\t7", "line 1501 has 41 columns"),
    (_line().rpartition("\t")[0], "line 1501 has 39 columns"),
    ("", "line 1501 is empty"),
    (_line("2"), "line 1501, column label: found '2', expected 0 or 1"),
    (_line(""), "line 1501, column label: found '', expected 0 or 1"),
    (_line("label"), "line 1501, column label: found 'label'"),
    (_line(I7="1.5"), "line 1501, column I7: found '1.5', expected an integer"),
    (_line(I7="0x1f"), "line 1501, column I7: found '0x1f'"),
    (_line(I13=" 3"), "line 1501, column I13: found ' 3'"),
    (_line(I2="2147483648"), "line 1501, column I2: found '2147483648', expected an integer of 32"),
    (_line(C1="xyz"), "line 1501, column C1: found 'xyz', expected 1 to 8 hexadecimal digits"),
    (_line(C26="123456789"), "line 1501, column C26: found '123456789'"),
    (_line(C4="0xab"), "line 1501, column C4: found '0xab'"),
    (_line(C5="-1"), "line 1501, column C5: found '-1'"),
    (_line(C5="a\rb"), r"line 1501, column C5: found 'a\\rb'"),
    (_line(C5="é"), "line 1501, column C5: found 'é'"),
]


@pytest.mark.parametrize("more", [[], ["worse"]])
@pytest.mark.parametrize(("bad", "message"), MISTAKES)
def test_a_mistake_is_found_by_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, message: str, more: list[str]
):
    """The file, the line counted from 1 and the column are named, many blocks into the file,
    whether it is the only mistake or the first; nothing is left of the data set."""
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 20_000)
    source = _write(tmp_path / "d.tsv", [_line()] * 1500 + [bad, _line(), *more])
    with pytest.raises(UserError, match=f"{source}, {message}") as caught:
        convert_criteo(source, tmp_path / "data")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["d.tsv"]


def test_a_mistake_in_decimal_ids(tmp_path: Path):
    """Hexadecimal text with `int` categoricals says which choice it needs."""
    source = _write(tmp_path / "d.tsv", [_line(C1="12ab")])
    with pytest.raises(UserError, match=r"line 1, column C1: found '12ab'.*categoricals hex"):
        convert_criteo(source, tmp_path / "data", categoricals="int")


def _truncated(path: Path) -> None:
    lines = (_line(I1=str(i)) for i in range(20_000))
    whole = gzip.compress("\n".join(lines).encode())
    path.write_bytes(whole[: len(whole) // 2])


def _damaged(path: Path) -> None:
    whole = bytearray(gzip.compress("\n".join([_line()] * 99).encode()))
    whole[-6] ^= 0xFF  # in the checksum
    path.write_bytes(whole)


@pytest.mark.parametrize("test_rows", [0, 5])
@pytest.mark.parametrize("spoil", [_truncated, _damaged])
def test_a_damaged_gzip_file_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], test_rows: int
):
    """Half a download or a wrong checksum is not a shorter data set."""
    source = tmp_path / "d.tsv.gz"
    spoil(source)
    with pytest.raises(UserError, match=rf"{source} cannot be read beyond line .* fetched again"):
        convert_criteo(source, tmp_path / "data", test_rows=test_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["d.tsv.gz"]


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")])
@pytest.mark.parametrize("test_rows", [0, 5])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes, test_rows: int):
    """No rows are no data set."""
    source = tmp_path / "d.tsv"
    source.write_bytes(content)
    with pytest.raises(UserError, match=f"{source} is empty"):
        convert_criteo(source, tmp_path / "data", test_rows=test_rows)


def test_a_file_without_lines_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A large binary file is refused at its first endless line, not read into memory."""
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 1000)
    source = tmp_path / "d.bin"
    source.write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="line 1 is longer than"):
        convert_criteo(source, tmp_path / "data")


def test_malformed_requests(tmp_path: Path):
    """What is wrong with the request itself is a RequestError, before anything is written."""
    source, out = _write(tmp_path / "d.tsv", [_line()] * 3), tmp_path / "data"
    with pytest.raises(RequestError, match=r"has 3 rows.* at most 2"):
        convert_criteo(source, out, test_rows=3)
    with pytest.raises(RequestError, match="test_rows is -1"):
        convert_criteo(source, out, test_rows=-1)
    with pytest.raises(RequestError, match="no such file"):
        convert_criteo(tmp_path / "none.tsv", out)
    with pytest.raises(RequestError, match="is a folder"):
        convert_criteo(tmp_path, out)
    with pytest.raises(RequestError, match="choose hex or int"):
        convert_criteo(source, out, categoricals="octal")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="row groups of 0"):
        convert_criteo(source, out, row_group_rows=0)
    assert [path.name for path in tmp_path.iterdir()] == ["d.tsv"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C in the middle of writing removes what was written."""
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 20_000)

    def interrupt(rows: int) -> None:
        if rows > 1000:
            raise KeyboardInterrupt

    source = _write(tmp_path / "d.tsv", [_line()] * 3000)
    with pytest.raises(KeyboardInterrupt):
        convert_criteo(source, tmp_path / "data", row_group_rows=10, on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["d.tsv"]
