"""`shardemb checkpoint import`: what export writes, and other tools have, as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from planner import RequestError, UserError
from shardemb.checkpoint.contents import dense_values, find, table_chunks, verify
from shardemb.checkpoint.export import export
from shardemb.checkpoint.import_weights import import_weights
from shardemb.config import RunConfig, load_config
from shardemb.models import build_model
from tests.launch.tiny_run import ROWS, make_data, shardemb, tiny_config, write_config


class Exported:
    """A run, one of whose tables is of fp16, and what export writes of it."""

    def __init__(self, folder: Path) -> None:
        config = tiny_config(make_data(folder / "data"), folder / "run")
        config["train"] |= {"max_steps": 6, "table_optimizer": {"name": "sgd"}}
        config["tables"]["C1"]["dtype"] = "fp16"
        self.folder, self.path = folder, write_config(folder / "run.yaml", config)
        process = shardemb("train", self.path, "--json")
        assert process.returncode == 0, process.stderr
        self.result: dict[str, Any] = json.loads(process.stdout)
        self.found = find(str(folder / "run"))
        self.tables, self.model = folder / "tables", folder / "model.safetensors"
        export(self.found, self.tables, "parquet", list(ROWS)[:4])
        export(self.found, self.tables, "safetensors", list(ROWS)[4:])
        export(self.found, self.model, "state_dict", [])

    def config(self, output: Path, *overrides: str) -> RunConfig:
        return load_config(self.path, [f"output={output}", *overrides])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("given", ["tables", "safetensors", "torch.save", "both"])
def test_what_was_exported_comes_back(exported: Exported, tmp_path: Path, given: str) -> None:
    """Tables, and where they are given dense parameters, to the bit; else these are a new run's."""
    config = exported.config(tmp_path / "run")
    tables = str(exported.tables) if given in ("tables", "both") else None
    state_dict: Path | None = None if given == "tables" else exported.model
    if given == "torch.save":
        state_dict = tmp_path / "model.pt"
        torch.save(safetensors.torch.load_file(exported.model), state_dict)
    elif given == "both":  # what only the folder has
        tensors = safetensors.torch.load_file(exported.model)
        state_dict = tmp_path / "dense.safetensors"
        names = [table.parameter for table in exported.found.manifest.tables.values()]
        dense = {n: t for n, t in tensors.items() if n not in names}
        safetensors.torch.save_file(dense, state_dict)
    import_weights(config, tables, state_dict)
    found = find(str(config.output))
    verify(found)
    assert (found.manifest.step, found.manifest.samples) == (0, 0)
    assert found.manifest.tables == exported.found.manifest.tables
    for name in ROWS:
        before, after = (torch.cat(list(table_chunks(f, name))) for f in (exported.found, found))
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    expected = dense_values(exported.found)
    if given == "tables":
        torch.manual_seed(config.seed)
        fresh = build_model(config).state_dict()
        expected = {name: fresh[name] for name in expected}
    dense = dense_values(found)
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], expected[name]) for name in dense)


def test_a_run_begins_with_what_was_imported(exported: Exported, tmp_path: Path) -> None:
    """By the command: it has the metrics of the run that was exported, at step 0; trains on with
    any optimizer, under any plan and on any number of ranks."""
    output = f"output={tmp_path / 'run'}"
    process = shardemb(
        "checkpoint", "import", exported.path, output, "--state-dict", exported.model, "--json"
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["checkpoint"] == f"{tmp_path}/run/checkpoints/step-00000000"
    assert [(table["name"], table["states"]) for table in report["tables"]] == [
        (name, []) for name in ROWS
    ]
    evaluated = shardemb("eval", exported.path, output, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["eval"] == pytest.approx(exported.result["eval"], rel=1e-5)
    others = ["train.table_optimizer.name=rowwise_adagrad", "sharding.default=row_wise"]
    arguments = [output, *others, "checkpoint.resume=latest", "launch.nproc_per_node=1", "--json"]
    trained = shardemb("train", exported.path, "train.max_steps=3", *arguments)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert (result["steps"], result["samples"]) == (3, 3 * 64)
    assert not (tmp_path / "run.1").exists()


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_all_that_differs_is_listed(exported: Exported, tmp_path: Path) -> None:
    """Missing, superfluous and of another shape, at once; nothing is left."""
    tensors = safetensors.torch.load_file(exported.model)
    removed, changed = [n for n in tensors if "embedding" not in n][:2]
    table = exported.found.manifest.tables["C3"].parameter
    del tensors[removed]
    shape = list(tensors[changed].shape)
    tensors |= {changed: torch.zeros(*shape, 2), table: torch.zeros(7, 8), "other": torch.zeros(1)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    before = listing(tmp_path)
    larger = exported.config(tmp_path / "run", "tables.C1.num_embeddings=41")
    with pytest.raises(UserError) as caught:
        import_weights(larger, str(exported.tables), tmp_path / "model.safetensors")
    message = str(caught.value)
    assert "table C1: shape [40, 8] in the file, [41, 8] in the model" in message
    assert f"{removed}: missing" in message
    assert f"{changed}: shape {[*shape, 2]} in the file, {shape} in the model" in message
    assert "other: not in the model" in message
    assert table not in message  # C3.parquet is taken instead
    with pytest.raises(UserError) as caught:
        import_weights(exported.config(tmp_path / "run"), None, tmp_path / "model.safetensors")
    assert f"{table}: shape [7, 8] in the file, [120, 8] in the model" in str(caught.value)
    with pytest.raises(UserError, match=r"table C1: there is no .*/C1.parquet or .safetensors"):
        import_weights(exported.config(tmp_path / "run"), str(tmp_path), None)
    assert listing(tmp_path) == before


class Harmful:
    """Unpickled, it would run code."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_what_cannot_be_imported(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told with the file and what to do; nothing is run and nothing is left."""
    torch.save({"model": Harmful()}, tmp_path / "harmful.pt")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "nested.pt")
    (tmp_path / "none.pt").write_text("nothing")
    (tmp_path / "cut.safetensors").write_bytes(exported.model.read_bytes()[:-9])
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ROWS:
        table = pq.read_table(export(exported.found, twice, "parquet", [name])[0])
        ids = table["id"].combine_chunks().to_pylist()
        rows = table.set_column(0, "id", [[*ids[:-1], 0] if name == "C6" else ids])
        pq.write_table(rows, twice / f"{name}.parquet")
    before = listing(tmp_path)
    for tables, state_dict, message in [
        (None, None, "name what to import: --tables FOLDER, --state-dict FILE, or both"),
        (None, "harmful.pt", "harmful.pt is no safetensors file, and not one of torch.save with"),
        (None, "none.pt", "none.pt is no safetensors file"),
        (None, "absent.pt", "absent.pt (No such file"),
        (None, "nested.pt", "holds a dict with model, epoch, not tensors by their names"),
        (None, "cut.safetensors", "cut.safetensors is damaged: it ends in"),
        (str(twice), None, "--tables: .*C6.parquet, row 239: a second vector for row 0"),
    ]:
        path = tmp_path / state_dict if state_dict else None
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            import_weights(exported.config(tmp_path / "run"), tables, path)
        assert listing(tmp_path) == before
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="holds checkpoints already, the last is step-00000006"):
        import_weights(load_config(exported.path), None, exported.model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="is not empty and not a run directory"):
        import_weights(exported.config(tmp_path / "full"), None, exported.model)
