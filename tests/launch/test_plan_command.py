"""`shardemb plan`: the planner's command, which reads run configs too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import app
from planner import Plan, Topology
from shardemb.config import load_config
from shardemb.planning import plan_run
from tests.launch.tiny_run import tiny_config, write_config
from tests.planner.commands import MALFORMED, TABLES, Ended, run_command

ON_FOUR = ("--topology", "1x4xA100-80GB")


@pytest.fixture
def shardemb_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs `shardemb plan` where run.yaml and tables.json are."""
    monkeypatch.chdir(tmp_path)
    write_config(Path("run.yaml"), tiny_config(Path("data"), Path("run")))
    Path("tables.json").write_text(json.dumps({"batch_size_per_rank": 64, "tables": TABLES}))

    def plan(*arguments: str) -> Ended:
        return run_command(app, ["shardemb", "plan", *arguments], monkeypatch, capfd)

    return plan


def made(ended: Ended) -> Any:
    assert ended.code == 0, ended.err
    return ended.document


def test_a_run_config(shardemb_plan: Callable[..., Ended]) -> None:
    """The plan is the one that `shardemb train` would make, without predictions."""
    document = made(shardemb_plan("run.yaml", "--out", "plan.json", "--json"))
    config = load_config("run.yaml")
    wanted = plan_run(config, Topology(world_size=2, local_world_size=2))
    assert document["fingerprint"] == wanted.fingerprint
    assert Plan.load(Path("plan.json")) == wanted
    assert document["predicted"]["step_ms"] is None


def test_overrides(shardemb_plan: Callable[..., Ended]) -> None:
    """KEY=VALUE changes what is planned, as it does for `shardemb train`."""
    options = ("sharding.default=row_wise", "launch.nproc_per_node=3", "--json")
    document = made(shardemb_plan("run.yaml", *options))
    assert document["topology"]["world_size"] == 3
    assert document["tables"]["C1"]["sharding_type"] == "row_wise"


def test_costs_of_the_run_s_plan(shardemb_plan: Callable[..., Ended]) -> None:
    """--cost and --topology predict what the config's own plan takes, and change no sharding."""
    plain = made(shardemb_plan("run.yaml", "--json"))
    torchrec = made(shardemb_plan("run.yaml", "--cost", "torchrec", "--json"))
    on_four = made(shardemb_plan("run.yaml", *ON_FOUR, "--batch-size", "8", "--json"))
    for document, model, size in ((torchrec, "torchrec", 64), (on_four, "analytic", 8)):
        assert (document["cost_model"], document["batch_size"]) == (model, size)
        assert document["predicted"]["step_ms"] > 0
        assert types(document) == types(plain)
    assert torchrec["topology"]["hardware"]["kind"] == "cpu"
    assert len(on_four["devices"]) == 4


def types(document: dict[str, Any]) -> dict[str, str]:
    return {name: table["sharding_type"] for name, table in document["tables"].items()}


def test_a_search_over_the_run_s_tables(shardemb_plan: Callable[..., Ended]) -> None:
    """--search auto is sharding.default=auto: tables with a rule of their own keep it."""
    asked = made(shardemb_plan("run.yaml", "--search", "auto", "--json"))
    by_key = made(shardemb_plan("run.yaml", "sharding.default=auto", "--json"))
    assert asked["fingerprint"] == by_key["fingerprint"]
    assert asked["predicted"]["bound_ms"] is not None
    assert types(asked)["C2"] == "row_wise" and types(asked)["C4"] == "data_parallel"


def test_options_take_the_place_of_keys(shardemb_plan: Callable[..., Ended]) -> None:
    """Each option is what the key of its meaning would be."""
    Path("pins.yaml").write_text("C1: {sharding_types: [row_wise]}")
    options = ("--search", "auto", "--cost", "torchrec", "--objective", "max_total")
    more = ("--batch-size", "32", "--seed", "3", "--constraints", "pins.yaml")
    keys = ("sharding.default=auto", "sharding.cost=torchrec", "sharding.objective=max_total")
    others = ("train.batch_size=32", "seed=3", "sharding.constraints.C1.sharding_types=[row_wise]")
    asked = made(shardemb_plan("run.yaml", *options, *more, "--json"))
    by_key = made(shardemb_plan("run.yaml", *keys, *others, "--json"))
    assert asked["fingerprint"] == by_key["fingerprint"]
    assert types(asked)["C1"] == "row_wise"


def test_a_table_list(shardemb_plan: Callable[..., Ended]) -> None:
    """The same file as `python -m planner plan` takes, also as YAML."""
    Path("tables.yaml").write_text(Path("tables.json").read_text())
    prints = [
        made(shardemb_plan(name, *ON_FOUR, "--json"))["fingerprint"]
        for name in ("tables.json", "tables.yaml")
    ]
    assert prints[0] == prints[1]


def test_the_verbs(shardemb_plan: Callable[..., Ended]) -> None:
    """Beside `shardemb plan FILE` there are show, diff, explain, sweep, export and import."""
    made(shardemb_plan("run.yaml", *ON_FOUR, "--search", "auto", "--out", "a.json", "--json"))
    made(shardemb_plan("run.yaml", *ON_FOUR, "--out", "b.json", "--json"))
    assert shardemb_plan("show", "a.json").code == 0
    assert made(shardemb_plan("diff", "a.json", "b.json", "--json"))["different"]
    assert made(shardemb_plan("explain", "b.json", "C2", "--json"))["options"]
    swept = made(
        shardemb_plan("sweep", "run.yaml", "--kinds", "H100", "--devices", "1,2", "--json")
    )
    assert [cell["batch_size"] for cell in swept["lines"][0]["cells"]] == [64, 64]
    made(shardemb_plan("export", "b.json", "--out", "torchrec.json", "--json"))
    back = made(
        shardemb_plan("import", "torchrec.json", "--tables", "run.yaml", *ON_FOUR, "--json")
    )
    assert back["tables"].keys() == json.loads(Path("b.json").read_text())["tables"].keys()


MISTAKES = {
    "missing config": (["no.yaml"], "cannot read the config no.yaml: No such file"),
    "missing table list": (["no.json"], "cannot read the table list no.json"),
    "unknown key": (["run.yaml", "trian.epochs=1"], "trian: unknown key"),
    "unknown cost": (
        ["run.yaml", "--cost", "x"],
        "--cost 'x': choose analytic, torchrec, cpu-2core or a profile",
    ),
    "unknown topology": (["run.yaml", "--topology", "2x"], "write HOSTSxDEVICESxKIND"),
    "baseline": (["run.yaml", "--search", "random"], "choose auto"),
    "time budget": (["run.yaml", "--time-budget", "1"], "is for table lists"),
    "a plan": (["plan.json"], "plan.json is a plan, not a table list; `plan show"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_request(
    shardemb_plan: Callable[..., Ended], arguments: list[str], message: str
) -> None:
    """What is wrong is told by the file's kind."""
    shardemb_plan("run.yaml", "--out", "plan.json")
    ended = shardemb_plan(*arguments)
    assert message in ended.err
    assert (ended.code, ended.out) == (MALFORMED, "")
