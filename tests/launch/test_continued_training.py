"""Day after day: new data with new values, a run that begins where that of yesterday ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.launch.tiny_run import shardemb, write_config

WORDS = [f"w{i}" for i in range(50)]


def run_json(*arguments: str | Path) -> Any:
    process = shardemb(*arguments, "--json")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


class Days:
    """Monday has the first 30 words, Tuesday all; the table is cut by rows on Monday and by
    columns on Tuesday, which does not train it, and gives its new words first values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        schema = {"dense": ["x"], "sparse": {"word": {"kind": "string", "vocabulary": {}}}}
        (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
        monday = self.convert("monday", 30)
        self.rows = monday["num_embeddings"]["word"]
        self.monday = run_json("train", self.config("monday", self.rows, "row_wise"))
        self.tuesday_info = self.convert("tuesday", 50, "--extend", folder / "data" / "monday")
        self.vectors = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
        lists = pa.array(self.vectors.tolist(), pa.list_(pa.float32()))
        words = [*WORDS[:47], "neverseen"]
        pq.write_table(pa.table({"word": words, "vector": lists}), folder / "words.parquet")
        rows = self.tuesday_info["num_embeddings"]["word"]
        pretrained = {"path": str(folder / "words.parquet"), "keys": "vocabulary"}
        self.path = self.config("tuesday", rows, "column_wise", pretrained=pretrained, frozen=True)

    def convert(self, day: str, words: int, *options: str | Path) -> Any:
        generator = np.random.default_rng(words)
        ids = [*range(words), *generator.integers(0, words, 1000 - words)]
        lines = [f"{i % 2},{generator.normal():.3f},{WORDS[i]}" for i in ids]
        (self.folder / f"{day}.csv").write_text("\n".join(["label,x,word", *lines]) + "\n")
        out = self.folder / "data" / day
        schema = ["--schema", self.folder / "schema.yaml", "--test-rows", "100", *options]
        return run_json("data", "convert", "csv", self.folder / f"{day}.csv", out, *schema)

    def config(self, day: str, rows: int, kind: str, **table: Any) -> Path:
        config = {
            "output": str(self.folder / "runs" / day),
            "data": {"dir": str(self.folder / "data" / day), "dense": {"columns": ["x"]}},
            "tables": {"word": {"num_embeddings": rows, "embedding_dim": 8, **table}},
            "model": {"name": "dlrm", "args": {"dense_layers": [8], "over_layers": [8]}},
            "sharding": {"default": kind},
            "train": {"batch_size": 64, "table_optimizer": {"name": "adagrad"}},
            "launch": {"nproc_per_node": 2, "device": "cpu"},
        }
        return write_config(self.folder / f"{day}.yaml", config)

    def table(self, day: str) -> Any:
        out = self.folder / "out" / day
        run_json("checkpoint", "export", self.folder / "runs" / day, out)
        rows = pq.read_table(out / "word.parquet")["embedding"].to_pylist()
        return np.array(rows, np.float32)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    return Days(tmp_path_factory.mktemp("days"))


def test_a_run_begins_with_the_checkpoint_of_another(days: Days) -> None:
    """Old words, and the row of unknown ones, keep their vectors to the bit, new ones have those of
    the file, or a new table's; the data are read from their beginning, and steps go on."""
    start = ["train", days.path, f"checkpoint.start_from={days.folder / 'runs' / 'monday'}"]
    process = shardemb(*start, "checkpoint.grow_tables=true", "--json")
    assert process.returncode == 0, process.stderr
    result, told = json.loads(process.stdout), " ".join(process.stderr.split())
    assert result["steps"] == days.monday["steps"] + -(-900 // 128)
    assert result["samples"] == days.monday["samples"] + 900
    assert f"table word: grows from {days.rows} rows to 51" in told
    assert "table word: 17 of 20 new rows begin as in" in told
    assert "; 1 of its keys have none" in told
    monday, tuesday = days.table("monday"), days.table("tuesday")
    assert len(monday) == days.rows == 31
    assert np.array_equal(tuesday[:31], monday)
    file = days.folder / "data" / "tuesday" / "vocabularies" / "word.parquet"
    vocabulary = pq.read_table(file)["value"].to_pylist()
    for row, word in enumerate(vocabulary[31:], start=31):
        if word in WORDS[:47]:
            assert np.array_equal(tuesday[row], days.vectors[WORDS.index(word)])
        else:
            assert 0 < np.abs(tuesday[row]).max() <= 1 / np.sqrt(51)


def test_and_goes_on_from_its_own(days: Days) -> None:
    """A run that has checkpoints of its own does not begin again with another's."""
    start = f"checkpoint.start_from={days.folder / 'runs' / 'monday'}"
    resumed = run_json("train", days.path, start, "checkpoint.resume=latest", "train.epochs=2")
    assert resumed["steps"] == days.monday["steps"] + 2 * -(-900 // 128)
