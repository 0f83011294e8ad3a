"""A run config is planned as it says: by the planner, by rules, for the hardware there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import RequestError, Topology
from planner.hardware import PRESETS
from shardemb.config import RunConfig, load_config
from shardemb.planning import plan_run, run_hardware

TWO = Topology(world_size=2, local_world_size=2)
TOPOLOGIES = Path(__file__).resolve().parents[2] / "configs" / "topologies"


def config(sharding: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"dir": "data"},
            "tables": {f"C{i}": {"num_embeddings": 10_000, "embedding_dim": 16} for i in range(6)},
            "sharding": sharding or {},
            "launch": {"device": "cpu"},
            **sections,
        }
    )


def test_auto_is_the_default_and_survives_yaml(tmp_path: Path) -> None:
    """Without rules the planner chooses, with a bound; the resolved config says so and is read
    again as the same."""
    plan = plan_run(config(), TWO)
    assert plan.cost_model == "analytic" and plan.objective == "stages"
    assert 0 < plan.predicted.bound_ms <= plan.predicted.step_ms
    (tmp_path / "run.yaml").write_text(config().to_yaml())
    assert yaml.safe_load(config().to_yaml())["sharding"]["default"] == "auto"
    assert load_config(tmp_path / "run.yaml") == config()


def test_rules_and_constraints_bind_the_planner() -> None:
    rules = {
        "C0": "row_wise",
        "C1": {"sharding_type": "column_wise", "ranks": [0, 1]},
        "C2": {"sharding_type": "table_wise", "ranks": [1]},
    }
    limits = {"C{3..4}": {"sharding_types": ["table_wise"], "ranks": [0]}}
    plan = plan_run(config({"tables": rules, "constraints": limits}), TWO)
    found = {n: (t.sharding_type, [s.rank for s in t.shards]) for n, t in plan.tables.items()}
    assert found["C0"] == ("row_wise", [0, 1])
    assert (found["C1"][0], sorted(found["C1"][1])) == ("column_wise", [0, 1])
    assert found["C2"] == ("table_wise", [1])
    assert found["C3"] == found["C4"] == ("table_wise", [0])


def test_a_rank_named_twice_is_for_rules_alone() -> None:
    rule = {"C1": {"sharding_type": "column_wise", "ranks": [0, 0]}}
    with pytest.raises(RequestError, match=r"sharding.tables.C1.ranks: a rank is named twice"):
        plan_run(config({"tables": rule}), TWO)
    plan = plan_run(config({"default": "table_wise", "tables": rule}), TWO)
    assert [shard.rank for shard in plan.tables["C1"].shards] == [0, 0]


def test_tables_that_cannot_be_replicated_are_not() -> None:
    """In fp16 with Adagrad's state, data_parallel is refused by the run: the planner knows."""
    small = {"C0": {"num_embeddings": 4, "embedding_dim": 16}}
    assert plan_run(config(tables=small), TWO).tables["C0"].sharding_type == "data_parallel"
    small["C0"]["dtype"] = "fp16"
    assert plan_run(config(tables=small), TWO).tables["C0"].sharding_type != "data_parallel"


@pytest.mark.parametrize(
    ("listed", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200\nNVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("", "cpu"),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_the_hardware_of_this_machine(
    listed: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU that nvidia-smi lists first, cpu where it lists none; one we have no numbers for
    is an error that names the key and the choices."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'EOF'\n{listed}\nEOF\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    on_any = config(launch={"device": "auto"})
    if kind:
        assert run_hardware(on_any) == PRESETS[kind]
    else:
        with pytest.raises(RequestError, match=r"sharding.hardware: .*A100-40GB.*cpu"):
            run_hardware(on_any)
    assert run_hardware(config()) == PRESETS["cpu"]  # launch.device: cpu


def test_named_hardware() -> None:
    assert run_hardware(config({"hardware": "h100"})) == PRESETS["H100"]
    ours = run_hardware(config({"hardware": str(TOPOLOGIES / "shared_machine.yaml")}))
    assert ours.kind == "two-cores"
    with pytest.raises(RequestError, match="there is no hardware kind 'H1000'"):
        run_hardware(config({"hardware": "H1000"}))
