"""A user's mistakes: each is told in one screen, without a traceback, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from launch import cli
from tests.launch.tiny_run import make_data, rewrite, tiny_config, write_config

MALFORMED, IMPOSSIBLE = 2, 1
SCREEN_LINES = 25


@dataclass
class Bench:
    """A folder with a good config and good data, for a test to spoil."""

    folder: Path
    argv: Callable[[list[str]], None]
    captured: pytest.CaptureFixture[str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def train_file(self) -> Path:
        return self.folder / "data" / "train" / "part-00000.parquet"

    def train(self, *overrides: str, keeps: str = "nothing") -> tuple[int, str]:
        """Exit code and message of `shardemb train`."""
        if self.config:
            write_config(self.path, self.config)
        return self.command("train", self.path.name, *overrides, keeps=keeps)

    def command(self, *arguments: str, keeps: str = "nothing") -> tuple[int, str]:
        """Exit code and message, which must fit a screen.

        No file may come, go or change, but below `keeps`.
        """
        before = listing(self.folder)
        self.argv(["shardemb", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = self.captured.readouterr()
        print(shown.err)  # beside a failure
        after = listing(self.folder)
        new = {path for path in after.keys() - before.keys() if not path.startswith(keeps)}
        assert not new and after.items() >= before.items()
        assert "Traceback" not in shown.err and shown.out == ""
        assert len(shown.err.splitlines()) < SCREEN_LINES
        return int(ended.value.code or 0), unboxed(shown.err)


def listing(folder: Path) -> dict[str, int]:
    """Every path below `folder`, and when a file was written."""
    return {
        str(path.relative_to(folder)): 0 if path.is_dir() else path.lstat().st_mtime_ns
        for path in folder.rglob("*")
    }


def unboxed(shown: str) -> str:
    """The text in rich's box, its line breaks undone."""
    lines = [line.strip("│╭╰╮╯─ ") for line in shown.splitlines()]
    return " ".join(" ".join(lines).split())


@pytest.fixture(scope="module")
def good_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("good") / "data", train_rows=400, test_rows=200)


@pytest.fixture
def bench(
    good_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Bench:
    monkeypatch.chdir(tmp_path)  # so that paths in messages are short
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(good_data, tmp_path / "data")
    made = Bench(tmp_path, lambda argv: monkeypatch.setattr(sys, "argv", argv), capfd)
    made.config = tiny_config(Path("data"), Path("run"))
    return made


# ------------------------------------------------------------------ the config

CONFIG_MISTAKES = {
    "unknown key": (
        ["train.batchsize=64"],
        "train.batchsize: unknown key; did you mean batch_size?",
    ),
    "unknown key in a table": (
        ["tables.C1.embeding_dim=8"],
        "tables.C1.embeding_dim: unknown key; did you mean embedding_dim?",
    ),
    "unknown section": (["trian.epochs=1"], "trian: unknown key; did you mean train?"),
    "wrong type": (
        ["train.batch_size=many"],
        "train.batch_size: Input should be a valid integer, unable to parse string as an integer "
        "(found 'many')",
    ),
    "out of range": (
        ["train.epochs=0"],
        "train.epochs: Input should be greater than 0 (found 0)",
    ),
    "required key missing": (["data={}"], "data.dir: required, but not given"),
    "a table without features": (
        ["tables.C1.feature_names=[]"],
        "tables.C1.feature_names: no feature uses this table: name one, or remove the table",
    ),
    "a feature named twice": (
        ["tables.C1.feature_names=[C1, C1]"],
        "tables.C1.feature_names: C1 is named twice",
    ),
    "a rule for an unknown table": (
        ["sharding.tables.C77=row_wise"],
        "sharding.tables.C77: there is no such table; known are C1, C2, C3, C4, C5, C6",
    ),
    "unknown sharding type": (
        ["sharding.tables.C1=rowwise"],
        "sharding.tables.C1.sharding_type: Input should be 'table_wise', 'row_wise', "
        "'column_wise', 'table_row_wise', 'table_column_wise', 'grid_shard' or 'data_parallel' "
        "(found 'rowwise')",
    ),
    "unknown default sharding type": (
        ["sharding.default=rowwise"],
        "sharding.default.sharding_type: Input should be 'table_wise'",
    ),
    "embeddings in bf16 between CPUs": (
        ["train.communication.forward=bf16"],
        "train.communication.forward: TorchRec does not send bf16 over gloo",
    ),
    "a table frozen for longer than the run": (
        ["tables.C2.frozen={until_step: 9}", "train.max_steps=9"],
        "tables.C2.frozen: the run ends before until_step 9 is over, so the table never trains",
    ),
    "override without a value": (["train.epochs"], "override 'train.epochs': write key.sub=value"),
}


@pytest.mark.parametrize(
    ("overrides", "message"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES.keys()
)
def test_a_wrong_config_key(bench: Bench, overrides: list[str], message: str) -> None:
    """A malformed config names the key by its full path, what was found and what could be."""
    code, shown = bench.train(*overrides)
    assert message in shown
    assert code == MALFORMED


def test_all_wrong_keys_are_told_at_once(bench: Bench) -> None:
    """Three mistakes take one attempt to see, not three."""
    _, shown = bench.train("train.batchsize=1", "seed=-1", "tables.C1.num_embeddings=x")
    for key in ("train.batchsize", "seed", "tables.C1.num_embeddings"):
        assert f"{key}: " in shown


FILE_MISTAKES = {
    "missing": (None, "cannot read the config run.yaml: No such file"),
    "not YAML": ("data: [1, 2\ntables: {", "run.yaml is not valid YAML: "),
    "a key twice": ("seed: 1\nseed: 2\n", "'seed' is given twice, on lines 1 and 2"),
    "a list": ("- 1\n", "run.yaml must hold `key: value` lines, found a list"),
    "empty": ("", "run.yaml must hold `key: value` lines"),
    "not text": (b"\xff\xfe\x00", "run.yaml is not a text file: "),
    "list as key": ("? [a, b]\n: 1\n", "run.yaml"),
}


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES.values(), ids=FILE_MISTAKES.keys())
def test_a_wrong_config_file(bench: Bench, text: str | bytes | None, message: str) -> None:
    """A config that cannot be read is told by its file, and its line where there is one."""
    bench.config = {}
    if text is not None:
        bench.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, shown = bench.command("train", "run.yaml")
    assert message in shown
    assert code == MALFORMED


def test_no_config_at_all(bench: Bench) -> None:
    """`shardemb train` alone says what is missing, not that a folder is no file."""
    code, shown = bench.command("train")
    assert "name a run config: shardemb train CONFIG" in shown
    assert code == MALFORMED


# ------------------------------------------------------------------ the plan


def test_a_plan_for_another_world_size(bench: Bench) -> None:
    """A plan is not stretched: how many devices it has and the run has are told."""
    make_plan(bench)
    code, shown = bench.train("sharding.plan=plan.json", "launch.nproc_per_node=4")
    assert "the plan is for 2 devices, 2 a host, the run has 4 devices, 4 a host" in shown
    assert code == IMPOSSIBLE


def test_a_plan_for_other_tables(bench: Bench) -> None:
    """Each table that differs is named with both sizes."""
    make_plan(bench)
    code, shown = bench.train("sharding.plan=plan.json", "tables.C1.num_embeddings=4000")
    assert "table C1 is 40 x 8 in the plan, 4000 x 8 in the run" in shown
    assert code == IMPOSSIBLE


def test_a_plan_edited_by_hand(bench: Bench) -> None:
    """What was changed after planning is refused, and the supported way to choose is named."""
    path = make_plan(bench)
    plan = json.loads(path.read_text())
    plan["tables"]["C1"]["shards"][0]["rank"] = 1 - plan["tables"]["C1"]["shards"][0]["rank"]
    path.write_text(json.dumps(plan))
    code, shown = bench.train("sharding.plan=plan.json")
    assert "plan.json was changed after it was made" in shown and "sharding.tables" in shown
    assert code == MALFORMED


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', None])
def test_a_plan_that_is_none(bench: Bench, text: str | None) -> None:
    """A damaged or missing plan file is named."""
    if text is not None:
        (bench.folder / "plan.json").write_text(text)
    code, shown = bench.train("sharding.plan=plan.json")
    assert "plan.json" in shown
    assert code == MALFORMED


def make_plan(bench: Bench) -> Path:
    write_config(bench.path, bench.config)
    bench.argv(["shardemb", "plan", str(bench.path), "--out", "plan.json", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    bench.captured.readouterr()
    return bench.folder / "plan.json"


# ------------------------------------------------------------------ the run directory


def test_an_output_below_a_file(bench: Bench) -> None:
    """A run directory that can never be is told before workers start."""
    code, shown = bench.train("output=run.yaml/below")
    assert "output: " in shown and "run.yaml is a file; choose another with output=DIR" in shown
    assert code == MALFORMED


def test_an_output_that_holds_something_else(bench: Bench) -> None:
    """Somebody's folder is neither written into nor renamed."""
    code, shown = bench.train("output=data")
    assert "output: data is not empty and not a run directory" in shown
    assert code == MALFORMED


def test_an_output_that_may_not_be_written(bench: Bench) -> None:
    """The folder and the reason are told before workers start."""
    with small_disk(bench.folder / "disk", "ro"):
        code, shown = bench.train("output=disk/run")
        assert "cannot write the run directory disk/run (Read-only file system)" in shown
        assert "starting" not in shown
        assert code == IMPOSSIBLE


def test_a_full_disk(bench: Bench) -> None:
    """No half-written run directory is left, an earlier run stays, the disk's reason is told."""
    with small_disk(bench.folder / "disk", "size=12k") as disk:
        (disk / "run").mkdir()
        (disk / "run" / "config.yaml").write_text("an earlier run")
        (disk / "ballast").write_bytes(bytes(4096))
        code, shown = bench.train("output=disk/run")
        assert "output: cannot write the run directory disk/run (No space left on device)" in shown
        assert code == IMPOSSIBLE


def test_a_disk_that_fills_up_at_once(bench: Bench) -> None:
    """A library's own error about it is told as shortly as ours, and nothing is left."""
    with small_disk(bench.folder / "disk", "size=12k"):
        code, shown = bench.train("output=disk/run")
        assert "No space left on device" in shown and "output=DIR" in shown
        assert code == IMPOSSIBLE


def test_a_disk_that_fills_up_in_time(bench: Bench) -> None:
    """The metrics so far stay, each line whole, and there is no result."""
    with small_disk(bench.folder / "disk", "size=24k") as disk:
        code, shown = bench.train(
            *("output=disk/run", "train.batch_size=4", "train.log_every=1"), keeps="disk/run"
        )
        assert "No space left on device" in shown
        assert code == IMPOSSIBLE
        lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert 1 < len(lines) < 50
        # There may be no room for failure.json and logs.
        left = {path.name for path in (disk / "run").iterdir()} - {"failure.json", "logs"}
        assert left == {"config.yaml", "plan.json", "metrics.jsonl", "tensorboard"}


@contextmanager
def small_disk(folder: Path, how: str) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ------------------------------------------------------------------ the data


def test_no_data(bench: Bench) -> None:
    """A wrong data.dir is named with what must be in it."""
    code, shown = bench.train("data.dir=elsewhere")
    assert "there is no folder elsewhere/train: data.dir must hold train/ and test/" in shown
    assert code == IMPOSSIBLE


def test_nothing_to_evaluate_on_while_training(bench: Bench) -> None:
    """The split is named, and both keys; before workers start."""
    code, shown = bench.train("evaluation.every_steps=5", "evaluation.split=valid")
    assert "evaluation.every_steps: data.dir data has no valid/ folder" in shown
    assert "(evaluation.split)" in shown
    assert code == IMPOSSIBLE


def test_labels_that_are_not_drawn(bench: Bench) -> None:
    """`data synth` draws one label: the key of others is named."""
    write_config(bench.path, bench.config)
    code, shown = bench.command("data", "synth", "run.yaml", "train.tasks.stars.loss=mse")
    assert "train.tasks: of labels, label (data.label) alone is drawn" in shown
    assert code == MALFORMED


def test_a_column_that_is_not_there(bench: Bench) -> None:
    """File and column are named, and what the file has."""
    rewrite(bench.train_file, lambda table: table.drop_columns(["C4"]))
    code, shown = bench.train()
    assert f"{bench.train_file.relative_to(bench.folder)} has no column C4" in shown
    assert "it has label, I1, I2, C1, C2" in shown
    assert code == IMPOSSIBLE


@pytest.mark.parametrize(("value", "name", "row"), [(None, "null", 7), (float("nan"), "nan", 399)])
def test_a_label_that_is_none(bench: Bench, value: float | None, name: str, row: int) -> None:
    """The row is named, whichever rank reads it: 7 is rank 0's, 399 is rank 1's."""

    def spoil(table: pa.Table) -> pa.Table:
        labels = [float(label) for label in table["label"].to_pylist()]
        labels[row] = value
        return set_column(table, "label", pa.array(labels, pa.float32()))

    rewrite(bench.train_file, spoil)
    code, shown = bench.train()
    assert f"part-00000.parquet, row {row}: the label (column label) is {name}" in shown
    assert code == IMPOSSIBLE


def test_an_id_outside_its_table(bench: Bench) -> None:
    """Table, feature, file and row are named, the table's rows, and both remedies."""

    def spoil(table: pa.Table) -> pa.Table:
        ids = table["C1"].to_pylist()
        ids[250] = 40
        return set_column(table, "C1", pa.array(ids))

    rewrite(bench.train_file, spoil)
    code, shown = bench.train()
    assert "data/train/part-00000.parquet, row 250: feature C1 has id 40, outside table C1" in shown
    assert "whose rows are 0 to 39" in shown
    assert "tables.C1.num_embeddings" in shown and "data.features.C1.ids: hash" in shown
    assert code == IMPOSSIBLE


def test_a_truncated_file(bench: Bench) -> None:
    """A file that was not written to its end is named as such."""
    whole = bench.train_file.read_bytes()
    bench.train_file.write_bytes(whole[: len(whole) // 2])
    code, shown = bench.train()
    assert "data/train/part-00000.parquet is not a whole Parquet file" in shown
    assert code == IMPOSSIBLE


def set_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


# ------------------------------------------------------------------ the model and the device

RUN_MISTAKES = {
    "unknown model": ("model.name=dlmr", "model.name: 'dlmr' is no built-in model; choose dlrm"),
    "model that cannot be imported": (
        "model.name=nowhere.models:Net",
        "model.name: cannot import 'nowhere.models:Net': No module named 'nowhere'",
    ),
    "unknown model argument": (
        "model.args={layers: [8]}",
        "model.args: dlrm: got an unexpected keyword argument 'layers'; "
        "it takes dense_layers, over_layers",
    ),
}


@pytest.mark.parametrize(("override", "message"), RUN_MISTAKES.values(), ids=RUN_MISTAKES.keys())
def test_a_wrong_model(bench: Bench, override: str, message: str) -> None:
    """The key is named, and what it could be."""
    code, shown = bench.train(override)
    assert message in shown
    assert code == MALFORMED


def test_a_device_that_is_not_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of workers and GPUs are told."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, shown = bench.train("launch.device=cuda")
    assert "launch.device is cuda, but 2 workers on this host have 0 GPUs" in shown
    assert code == MALFORMED
