"""`shardemb checkpoint` and `shardemb eval`: what a run has saved, seen from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torchmetrics.functional.classification import binary_auroc

from shardemb.config import RunConfig, load_config
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.models import build_model
from tests.launch.tiny_run import ROWS, make_data, shardemb, tiny_config, write_config


class Trained:
    def __init__(self, folder: Path) -> None:
        config = tiny_config(make_data(folder / "data"), folder / "run")
        config["checkpoint"] = {"every_steps": 10}
        config["tables"]["C6"]["num_embeddings"] = 5000  # most of it is never looked up
        self.folder, self.directory = folder, folder / "run"
        self.path = write_config(folder / "run.yaml", config)
        process = shardemb("train", self.path, "--json")
        assert process.returncode == 0, process.stderr
        self.result: dict[str, Any] = json.loads(process.stdout)

    @property
    def config(self) -> RunConfig:
        return load_config(self.path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def run_json(*arguments: str | Path) -> Any:
    process = shardemb(*arguments, "--json")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-00000016"])
def test_inspect(trained: Trained, where: str) -> None:
    """Steps, samples, tables and sizes, whichever folder is named."""
    report = run_json("checkpoint", "inspect", trained.directory / where)
    assert report["checkpoint"] == trained.result["checkpoint"]
    assert (report["step"], report["samples"], report["world_size"]) == (16, 2000, 2)
    assert report["epoch"] == 0
    assert report["bytes"] == sum(
        path.stat().st_size for path in Path(report["checkpoint"]).glob("*.safetensors")
    )
    tables = {table["name"]: table for table in report["tables"]}
    assert tables.keys() == ROWS.keys()
    assert tables["C2"]["sharding_type"] == "row_wise"
    assert tables["C2"]["states"] == ["sum"]
    assert tables["C2"]["bytes"] == ROWS["C2"] * 8 * 4 * 2  # weights and Adagrad's state
    shown = shardemb("checkpoint", "inspect", trained.directory / where).stdout
    assert "step 16, in epoch 0, 2,000 samples" in " ".join(shown.split())
    assert all(name in shown for name in ROWS)


def test_health(trained: Trained) -> None:
    """Rows never trained are those whose ids are not in the data; norms are those of the rows."""
    report = run_json("checkpoint", "inspect", trained.directory, "--health")
    run_json("checkpoint", "export", trained.directory, trained.folder / "health")
    train = pq.read_table(trained.folder / "data" / "train")
    for table in report["tables"]:
        column = train[table["name"]].combine_chunks()
        ids = set((column.flatten() if table["name"] == "C5" else column).to_pylist())
        health = table["health"]
        assert health["never_trained_rows"] == table["num_embeddings"] - len(ids)
        assert health["not_finite_rows"] == 0
        rows = pq.read_table(trained.folder / "health" / f"{table['name']}.parquet")
        norms = torch.tensor(rows["embedding"].to_pylist(), dtype=torch.float64).norm(dim=1)
        assert health["max_norm"] == pytest.approx(norms.max().item())
        assert health["rms_norm"] == pytest.approx(norms.square().mean().sqrt().item())


def test_verify_names_what_is_damaged(trained: Trained, tmp_path: Path) -> None:
    """A whole checkpoint is told to be so; a changed byte is found, with its file and table."""
    newest = Path(trained.result["checkpoint"])
    assert run_json("checkpoint", "verify", newest)["ok"]
    assert "is whole" in shardemb("checkpoint", "verify", newest).stdout
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    manifest = json.loads((copy / "manifest.json").read_text().rpartition("}")[0] + "}")
    piece = next(piece for piece in manifest["pieces"] if piece["table"] == "C6")
    path = tmp_path / piece["file"]
    data = bytearray(path.read_bytes())
    data[piece["start"]] ^= 1
    path.write_bytes(data)
    process = shardemb("checkpoint", "verify", copy)
    assert process.returncode == 1
    assert f"{path} is damaged" in process.stderr
    assert "C6" in process.stderr


def test_an_exported_model_is_the_trained_one(trained: Trained) -> None:
    """The state_dict, loaded by other libraries into the unsharded model, has the test AUC that
    the run reported."""
    out = trained.folder / "model.safetensors"
    run_json("checkpoint", "export", trained.directory, out, "--format", "state_dict")
    model = build_model(trained.config).eval()
    model.load_state_dict(safetensors.torch.load_file(out), assign=True)
    reader = ParquetReader(
        trained.config.data.split("test"),
        BatchSchema.from_config(trained.config),
        batch_size=500, rank=0, world_size=1,
    )  # fmt: skip
    batch = next(reader.epoch())
    with torch.no_grad():
        scores = model(batch).reshape(-1).sigmoid()
    auc = binary_auroc(scores, batch.labels.long(), thresholds=None).item()
    assert auc == pytest.approx(trained.result["eval"]["auc"], abs=1e-6)


def test_exported_tables(trained: Trained) -> None:
    """Parquet and safetensors have the same rows, in the order of their ids; one table alone if
    asked for."""
    parquet, tensors = trained.folder / "parquet", trained.folder / "tensors"
    files = run_json("checkpoint", "export", trained.directory, parquet)["files"]
    assert {Path(file).stem for file in files} == set(ROWS)
    export = ["checkpoint", "export", str(trained.directory), str(tensors)]
    files = run_json(*export, "--format", "safetensors", "--table", "C6")["files"]
    assert [path.name for path in tensors.iterdir()] == ["C6.safetensors"]
    table = pq.read_table(parquet / "C6.parquet")
    assert table["id"].to_pylist() == list(range(5000))
    rows = torch.tensor(table["embedding"].to_pylist())
    assert torch.equal(rows, safetensors.torch.load_file(tensors / "C6.safetensors")["weight"])


@pytest.mark.parametrize("workers", [1, 3])
def test_eval(trained: Trained, workers: int) -> None:
    """The newest checkpoint has the metrics that the run ended with, on any number of ranks; an
    earlier one others."""
    evaluate = ["eval", str(trained.path), f"launch.nproc_per_node={workers}"]
    newest = run_json(*evaluate)
    assert newest["step"] == 16
    assert newest["eval"] == pytest.approx(trained.result["eval"], rel=1e-5)
    if workers == 1:
        earlier = run_json(*evaluate, "--checkpoint", "step-00000010")
        assert earlier["step"] == 10
        assert earlier["eval"]["logloss"] != pytest.approx(newest["eval"]["logloss"], rel=1e-5)


def test_mistakes(trained: Trained, tmp_path: Path) -> None:
    """Each is told in one message with what there is instead."""
    for arguments, code, message in [
        (["inspect", tmp_path], 1, "is no checkpoint and holds none"),
        (["inspect", trained.directory / "checkpoints" / "step-00000011"], 1, "step-00000010"),
        (["export", trained.directory, tmp_path / "a", "--table", "C7"], 2, "known are C1, C2"),
        (["export", trained.directory, tmp_path / "a", "--format", "npy"], 2, "choose one of"),
    ]:
        process = shardemb("checkpoint", *map(str, arguments))
        assert process.returncode == code, process.stderr
        assert message in " ".join(process.stderr.split())
    process = shardemb("eval", trained.path, f"output={tmp_path / 'other'}")
    assert process.returncode == 1
    assert "there is no checkpoint in" in process.stderr
