from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import RequestError, TableSpec
from planner.table_list import TableList, load_table_list

T = {"name": "t", "num_embeddings": 100, "embedding_dim": 8}


def _load(tmp_path: Path, *tables: Any, **top: Any) -> TableList:
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": tables, **top}))
    return load_table_list(path)


def _mistakes(tmp_path: Path, *tables: Any, **top: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        _load(tmp_path, *tables, **top)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'tables.json'} is not a valid table list:"
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_every_key(tmp_path: Path, suffix: str):
    """JSON and YAML say the same; what is left out has TableSpec's defaults."""
    shares = [0.5] + [0.03125] * 16
    full = {
        **T, "name": "u", "pooling_factor": 6, "num_features": 3, "dtype": "bf16", "weighted": True,
        "pooled": False, "optimizer": "sgd", "reuse_histogram": shares,
    }  # fmt: skip
    document = {"batch_size_per_rank": 512, "batch_size": 4096, "tables": [T, full]}
    path = tmp_path / f"tables.{suffix}"
    path.write_text(json.dumps(document) if suffix == "json" else yaml.safe_dump(document))
    assert load_table_list(str(path)) == TableList(
        batch_size_per_rank=512,
        batch_size_global=4096,
        tables=(
            TableSpec(name="t", num_embeddings=100, embedding_dim=8),
            TableSpec(
                name="u", num_embeddings=100, embedding_dim=8, num_features=3, pooling_factor=2.0,
                dtype="bf16", weighted=True, pooled=False, optimizer="sgd",
                reuse_histogram=tuple(shares),
            ),
        ),
    )  # fmt: skip


def test_pooling_factor_is_of_all_features(tmp_path: Path):
    """By hand: features of 1 and 10 ids are 11 in the list, and 5.5 for each in the spec."""
    named = {**T, "feature_names": ["a", "b"], "pooling_factor": 11}
    table = _load(tmp_path, named).tables[0]
    assert (table.num_features, table.pooling_factor) == (2, 5.5)
    assert table.feature_names == ("a", "b")


def test_keys_that_only_describe(tmp_path: Path):
    """Where a list is from and what was reported of it changes nothing, whatever its type."""
    plain = _load(tmp_path, T)
    described = {"name": "x", "source": ["y"], "world_size": 96, "reported": {"max_ms": 1.5}}
    assert _load(tmp_path, T, **described) == plain


def test_counts_as_people_write_them(tmp_path: Path):
    """1e6 rows are a whole number of rows; 1.5 are not."""
    assert _load(tmp_path, {**T, "num_embeddings": 1e6}).tables[0].num_embeddings == 1_000_000
    path = tmp_path / "tables.yaml"
    path.write_text("tables: [{name: t, num_embeddings: 4e7, embedding_dim: 8}]\n")
    assert load_table_list(path).tables[0].num_embeddings == 40_000_000


@pytest.mark.parametrize(
    ("changed", "mistake"),
    [
        ({"num_embeddings": 0}, "num_embeddings: Input should be greater than 0 (found 0)"),
        ({"embedding_dim": -4}, "embedding_dim: Input should be greater than 0 (found -4)"),
        ({"num_features": 0}, "num_features: Input should be greater than 0 (found 0)"),
        ({"num_embeddings": "9"}, "num_embeddings: Input should be a valid integer (found '9')"),
        ({"num_embeddings": 1.5}, "num_embeddings: Input should be a valid integer (found 1.5)"),
        ({"num_embeddings": True}, "num_embeddings: Input should be a valid integer (found True)"),
        ({"embedding_dim": None}, "embedding_dim: Input should be a valid integer (found None)"),
        ({"weighted": 1}, "weighted: Input should be a valid boolean (found 1)"),
        ({"pooling_factor": -1}, "pooling_factor: Input should be greater than or equal to 0"),
        ({"pooling_factor": float("nan")}, "pooling_factor: Input should be a finite number"),
        ({"pooling_factor": float("inf")}, "pooling_factor: Input should be a finite number"),
        ({"dtype": "fp8"}, "dtype: Input should be 'fp32', 'fp16' or 'bf16' (found 'fp8')"),
        ({"optimizer": "lion"}, "optimizer: Input should be 'sgd', 'adagrad', "),
        ({"num_embedings": 5}, "num_embedings: unknown key; did you mean num_embeddings?"),
        ({"feature_names": "ab"}, "feature_names: must be a list of names (found 'ab')"),
        ({"feature_names": 5}, "feature_names: must be a list of names (found 5)"),
        ({"feature_names": ["a"], "num_features": 2}, "num_features is 2, but feature_names has 1"),
        ({"reuse_histogram": [1.0]}, "reuse_histogram: there must be 17 shares, not 1"),
        ({"reuse_histogram": [0.1] * 17}, "reuse_histogram: the shares must be >= 0 and sum to 1"),
        ({"reuse_histogram": 5}, "reuse_histogram: Input should be a valid tuple (found 5)"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, changed: dict[str, Any], mistake: str):
    """The message has the file, the table by name and position, the key and the reason."""
    (found,) = _mistakes(tmp_path, {**T, "name": "first"}, {**T, **changed})
    assert found.startswith(f"table t (tables.1): {mistake}")


def test_tables_without_a_name(tmp_path: Path):
    """A table is then told by its position; what is no table too."""
    nameless = {"num_embeddings": 5, "embedding_dim": 4}
    assert _mistakes(tmp_path, T, nameless, 5, {**T, "name": ""}) == [
        "tables.1: name: required, but not given",
        "tables.2: must be the keys of one table (found 5)",
        "tables.3: name: String should have at least 1 character (found '')",
    ]


def test_histograms_sum_to_one_within_a_percent(tmp_path: Path):
    """Shares rounded for printing still load."""
    shares = [0.992] + [0.0] * 16
    assert _load(tmp_path, {**T, "reuse_histogram": shares}).tables[0].reuse_histogram is not None
    shares[0] = 0.98
    assert "they sum to 0.98" in _mistakes(tmp_path, {**T, "reuse_histogram": shares})[0]


def test_names_given_twice(tmp_path: Path):
    """All of them are told at once."""
    names = ["b", "a", "c", "b", "a", "b"]
    assert _mistakes(tmp_path, *({**T, "name": name} for name in names)) == [
        "more than one table is named a, b: give each its own"
    ]


def test_many_mistakes(tmp_path: Path):
    """The first ten are told, and how many there are besides."""
    found = _mistakes(tmp_path, *({**T, "embedding_dim": 0} for _ in range(25)))
    assert len(found) == 11 and found[-1] == "... and 15 more"


@pytest.mark.parametrize("text", ["2560", "2560*1", "n/a"])
def test_batch_sizes_that_repeat_the_rest(tmp_path: Path, text: str):
    """TorchRec's report of a table's batches: nothing new where it agrees."""
    described = _load(tmp_path, {**T, "batch_sizes": text}, batch_size_per_rank=2560)
    assert described == _load(tmp_path, T, batch_size_per_rank=2560)
    _load(tmp_path, {**T, "batch_sizes": text})  # nothing to compare the rows with


@pytest.mark.parametrize(
    ("batch_sizes", "mistake"),
    [
        ("2560*4", "batch_sizes: 2560*4 is of 4 features, num_features says 1"),
        ("512", "batch_sizes: 512 is of 512 rows, batch_size_per_rank says 2560"),
        ("2560, 512*3", "a table cannot be planned for batches of several sizes"),
        (2560, "write ROWS*FEATURES, for example 2560*4"),
    ],
)
def test_batch_sizes_that_contradict(tmp_path: Path, batch_sizes: Any, mistake: str):
    """What they say must be what the plan is made for."""
    table = {**T, "batch_sizes": batch_sizes}
    (found,) = _mistakes(tmp_path, table, batch_size_per_rank=2560)
    assert found.startswith("table t (tables.0): batch_sizes: ") and mistake in found


@pytest.mark.parametrize(
    ("top", "mistake"),
    [
        ({"batch_size_per_rank": 0}, "batch_size_per_rank: Input should be greater than 0"),
        ({"batch_size": "8"}, "batch_size: Input should be a valid integer (found '8')"),
        ({"batch_sise": 8}, "batch_sise: unknown key; did you mean batch_size?"),
        ({"tables": []}, "tables: List should have at least 1 item"),
        ({"tables": {"t": {}}}, "tables: Input should be a valid list (found {'t': {}})"),
    ],
)
def test_wrong_keys_at_the_top(tmp_path: Path, top: dict[str, Any], mistake: str):
    """By their names, unknown ones with the nearest known."""
    (found,) = _mistakes(tmp_path, T, **top)
    assert found.startswith(mistake)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON: Expecting value"),
        ('{"tables": [', "is not valid JSON: Expecting value: line 1 column 13"),
        ('{"tables": [{"name": "a", "name": "b"}]}', "is not valid JSON: 'name' is given twice"),
        ('{"tables": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("[]", "must hold an object with the key `tables`, found a list"),
        ("{}", "tables: required, but not given"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, message: str):
    """Damaged files are told by their path and what is wrong in them."""
    path = tmp_path / "tables.json"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        load_table_list(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("name", ["tables.json", "tables.yaml"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str):
    """No file, a folder, and bytes that are no text."""
    path = tmp_path / name
    with pytest.raises(RequestError, match=f"cannot read the table list {path}: No such file"):
        load_table_list(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="is not a text file"):
        load_table_list(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(RequestError, match=f"cannot read the table list {path}: Is a directory"):
        load_table_list(path)


def test_ten_thousand_tables_load_fast(tmp_path: Path):
    """About 0.2 s; the limit leaves room for a busy machine."""
    table = {**T, "num_features": 2, "reuse_histogram": [1 / 17] * 17}
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": [{**table, "name": f"t{i}"} for i in range(10_000)]}))
    start = time.process_time()
    assert len(load_table_list(path).tables) == 10_000
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("name", "tables", "per_rank", "of_all_ranks"),
    [
        ("hugectr_180table", 177, 8192, None),
        ("hugectr_7table", 7, 8192, None),
        ("mlperf_dlrm_dcnv2", 26, 8192, None),
        ("nvidia_medium", 311, None, 65536),
        ("nvidia_tiny", 55, None, 65536),
        ("synthetic_856_seed0", 856, 8192, None),
        ("torchrec_wiki_1935", 1935, 2560, None),
    ],
)
def test_published_lists(
    shared_data: Path, name: str, tables: int, per_rank: int | None, of_all_ranks: int | None
):
    """The lists people publish load as they are, with all their tables."""
    found = load_table_list(shared_data / "planner" / f"{name}.json")
    assert len(found.tables) == tables
    assert (found.batch_size_per_rank, found.batch_size_global) == (per_rank, of_all_ranks)


def test_torchrecs_example_by_hand(shared_data: Path):
    """Its first table: four sequence features with 6,066 ids a row in all, 1,516.5 each."""
    table = load_table_list(shared_data / "planner" / "torchrec_wiki_1935.json").tables[0]
    assert (table.num_embeddings, table.embedding_dim) == (80_000_000, 128)
    assert (table.num_features, table.pooling_factor, table.pooled) == (4, 1516.5, False)
