"""`plan` and its verbs, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner import Plan

from .commands import IMPOSSIBLE, MALFORMED, TABLES, Bench

ROOT = Path(__file__).resolve().parents[2]
ON_FOUR = ("--topology", "1x4xA100-80GB")
TINY = {"name": "t", "num_embeddings": 100, "embedding_dim": 8}


def test_plan_makes_a_plan(bench: Bench) -> None:
    """--json prints what --out writes, one object with costs and a bound, and nothing else."""
    ended = bench.plan("tables.json", *ON_FOUR, "--out", "plan.json", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.document == json.loads(Path("plan.json").read_text())
    plan = Plan.load(Path("plan.json"))
    assert set(plan.tables) == {table["name"] for table in TABLES}
    assert (plan.cost_model, plan.objective, plan.batch_size) == ("analytic", "stages", 1024)
    assert plan.predicted.step_ms and plan.predicted.bound_ms
    assert plan.predicted.bound_ms <= plan.predicted.step_ms


def test_the_report_names_every_table(bench: Bench) -> None:
    """Without --json the plan is shown to people."""
    ended = bench.plan("tables.json", *ON_FOUR)
    assert ended.code == 0 and ended.err == ""
    assert all(table["name"] in ended.out for table in TABLES)


def test_a_file_named_like_a_verb(bench: Bench) -> None:
    """`plan show` is the verb; the file of that name is ./show, or named to `plan make`."""
    bench.write("show", Path("tables.json").read_text())
    as_file, as_path = bench.made("make", "show", *ON_FOUR), bench.made("./show", *ON_FOUR)
    assert as_file["fingerprint"] == as_path["fingerprint"]
    ended = bench.plan("show", *ON_FOUR)
    assert ended.code == MALFORMED and "--topology" in ended.err


def test_options_may_come_before_the_file(bench: Bench) -> None:
    """Only a first argument that is a verb is one."""
    assert bench.plan(*ON_FOUR, "tables.json").code == 0


def test_help_has_options_and_verbs(bench: Bench) -> None:
    """One page says what `plan FILE` takes and which verbs there are."""
    shown = bench.plan("--help").out
    words = ["--topology", "--constraints", "show", "diff", "explain", "sweep", "export", "import"]
    assert [word for word in words if word not in shown] == []


def test_the_options_reach_the_plan(bench: Bench) -> None:
    """Cost model, objective, batch size, baseline, constraints and dense model are used."""
    bench.write("pins.yaml", "users: {sharding_types: [row_wise]}\ndays: {ranks: [3]}\n")
    options = [
        "--cost",
        "torchrec",
        "--objective",
        "max_total",
        "--batch-size",
        "64",
        "--seed",
        "1",
    ]
    more = ["--constraints", "pins.yaml", "--dense-bytes", "1GiB", "--time-budget", "0.1"]
    made = bench.made("tables.json", *ON_FOUR, *options, *more)
    assert (made["cost_model"], made["objective"], made["batch_size"]) == (
        "torchrec", "max_total", 64,
    )  # fmt: skip
    assert made["tables"]["users"]["sharding_type"] == "row_wise"
    assert {shard["rank"] for shard in made["tables"]["days"]["shards"]} == {3}
    assert min(device["memory_bytes"] for device in made["devices"]) > 2**30


def test_the_search_is_no_worse_than_a_baseline(bench: Bench) -> None:
    """--search names a published rule to compare with."""
    best = bench.made("tables.json", *ON_FOUR)
    rule = bench.made("tables.json", *ON_FOUR, "--search", "size_greedy")
    assert {table["sharding_type"] for table in rule["tables"].values()} == {"table_wise"}
    assert best["predicted"]["step_ms"] <= rule["predicted"]["step_ms"]


def test_a_large_table_on_one_device(bench: Bench) -> None:
    """Ten million rows and one device are planned for like anything else."""
    bench.write_tables({**TINY, "num_embeddings": 10_000_000}, batch_size_per_rank=512)
    made = bench.made("tables.json", "--topology", "1x1xA100-80GB")
    assert [shard["rank"] for shard in made["tables"]["t"]["shards"]] == [0]


def test_nothing_fits(bench: Bench) -> None:
    """Work that cannot be done is no malformed request; the table is named, nothing is written."""
    bench.write_tables({**TINY, "name": "huge", "num_embeddings": 2**40}, batch_size_per_rank=8)
    ended = bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    assert ended.code == IMPOSSIBLE and ended.out == "" and "huge" in ended.err
    assert not Path("plan.json").exists()


def test_nothing_fits_as_json(bench: Bench) -> None:
    """The proof and what would fit are one object on stdout; the message stays on stderr."""
    bench.write_tables({**TINY, "num_embeddings": 2**36}, batch_size_per_rank=8)
    ended = bench.plan("tables.json", "--topology", "1x1xA100-80GB", "--json")
    assert ended.code == IMPOSSIBLE and "no plan fits" in ended.err
    document = ended.document
    assert document["error"] == "no plan fits the memory"
    assert document["certificate"]["tables"] == ["t"]
    assert "devices" in {remedy["kind"] for remedy in document["remedies"]}


def test_the_batch_size(bench: Bench) -> None:
    """--batch-size wins over the table list, whose batch_size is of all ranks together."""
    bench.write_tables(batch_size=4096)
    assert bench.made("tables.json", *ON_FOUR)["batch_size"] == 1024
    assert bench.made("tables.json", *ON_FOUR, "--batch-size", "8")["batch_size"] == 8
    bench.write_tables(batch_size=4096, batch_size_per_rank=1024)
    assert bench.made("tables.json", *ON_FOUR)["batch_size"] == 1024


BATCH_MISTAKES = {
    "neither": ({"name": "x"}, "the batch size is not known: give --batch-size"),
    "both, and they differ": (
        {"batch_size": 4096, "batch_size_per_rank": 512},
        "batch_size_per_rank 512 on 4 devices is not batch_size 4,096",
    ),
    "not for so many devices": (
        {"batch_size": 4097},
        "batch_size 4,097, of all ranks, cannot be divided by 4 devices: give --batch-size",
    ),
    "too large": ({"batch_size_per_rank": 10**12}, "is more than 1,000,000,000"),
}


@pytest.mark.parametrize(("top", "message"), BATCH_MISTAKES.values(), ids=BATCH_MISTAKES.keys())
def test_a_wrong_batch_size(bench: Bench, top: dict[str, object], message: str) -> None:
    """The numbers are told, and the option that settles it."""
    bench.write_tables(**top)
    ended = bench.plan("tables.json", *ON_FOUR)
    assert message in ended.err
    assert ended.code == MALFORMED


MISTAKES = {
    "missing file": (["nope.json", *ON_FOUR], "cannot read the table list nope.json: No such file"),
    "no topology": (["tables.json"], "name the devices to plan for: --topology"),
    "unknown kind": (
        ["tables.json", "--topology", "1x4xZ9"],
        "there is no hardware kind 'Z9'. Known are torchrec-80GB, A100-40GB",
    ),
    "malformed topology": (["tables.json", "--topology", "8"], "write HOSTSxDEVICESxKIND"),
    "missing topology file": (
        ["tables.json", "--topology", "t.yaml"],
        "cannot read the topology t.yaml: No such file",
    ),
    "unknown objective": (
        ["tables.json", *ON_FOUR, "--objective", "fast"],
        "--objective 'fast': choose stages or max_total",
    ),
    "unknown cost model": (
        ["tables.json", *ON_FOUR, "--cost", "mine"],
        "--cost 'mine': choose analytic, torchrec, cpu-2core or a profile (FILE.json)",
    ),
    "unknown search": (
        ["tables.json", *ON_FOUR, "--search", "best"],
        "--search 'best': choose auto, dreamshard, random",
    ),
    "time for a baseline": (
        ["tables.json", *ON_FOUR, "--search", "random", "--time-budget", "1"],
        "--time-budget is for --search auto",
    ),
    "verify": (["tables.json", *ON_FOUR, "--verify"], "use `shardemb plan --verify`"),
    "endless": (["tables.json", *ON_FOUR, "--time-budget", "inf"], "--time-budget inf"),
    "dense bytes": (["tables.json", *ON_FOUR, "--dense-bytes", "big"], "--dense-bytes 'big'"),
    "batch size 0": (["tables.json", *ON_FOUR, "--batch-size", "0"], "--batch-size"),
    "override": (["tables.json", "a.b=1", *ON_FOUR], "only a run config takes KEY=VALUE"),
    "unknown option": (["tables.json", "--topolgy", "x"], "No such option: --topolgy"),
    "out in no folder": (
        ["tables.json", *ON_FOUR, "--out", "no/plan.json"],
        "--out no/plan.json: there is no folder no",
    ),
    "html is a folder": (["tables.json", *ON_FOUR, "--html", "."], "--html . is a folder"),
    "missing constraints": (
        ["tables.json", *ON_FOUR, "--constraints", "pins.yaml"],
        "cannot read the constraints pins.yaml: No such file",
    ),
    "missing plan": (["show", "plan.json"], "cannot read the plan plan.json: No such file"),
    "no plan": (["show", "tables.json"], "tables.json is not a plan: it has no fingerprint"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_malformed_request(bench: Bench, arguments: list[str], message: str) -> None:
    """What was given is told, and what could be; stdout stays empty."""
    ended = bench.plan(*arguments)
    assert message in re.sub(r"\s+", " ", ended.err)
    assert (ended.code, ended.out) == (MALFORMED, "")


TABLE_MISTAKES = {
    "duplicate names": ([TINY, TINY], "more than one table is named t: give each its own"),
    "no tables": ([], "tables: List should have at least 1 item"),
    "unknown key": ([{**TINY, "rows": 1}], "table t (tables.0): rows: unknown key"),
}


@pytest.mark.parametrize(("tables", "message"), TABLE_MISTAKES.values(), ids=TABLE_MISTAKES.keys())
def test_a_wrong_table_list(bench: Bench, tables: list[object], message: str) -> None:
    """The table and the key are named."""
    bench.write("tables.json", json.dumps({"batch_size_per_rank": 8, "tables": tables}))
    ended = bench.plan("tables.json", *ON_FOUR)
    assert message in ended.err
    assert ended.code == MALFORMED


CONSTRAINT_MISTAKES = {
    "unknown table": ("user: {ranks: [0]}", "constraints.user: there is no such table"),
    "unknown key": ("users: {rank: [0]}", "users: rank: unknown key; did you mean ranks?"),
    "unknown type": (
        "users: {sharding_types: [rowwise]}",
        "users: sharding_types.0: Input should be 'table_wise'",
    ),
    "no mapping": ("users: row_wise", "users: "),
    "rank beyond the last": ("users: {ranks: [4]}", "constraints.users.ranks: 4 is no rank"),
    "contradiction": (
        "users: {sharding_types: [row_wise], ranks: [1]}",
        "constraints leave no way to shard users",
    ),
}


@pytest.mark.parametrize(
    ("text", "message"), CONSTRAINT_MISTAKES.values(), ids=CONSTRAINT_MISTAKES.keys()
)
def test_wrong_constraints(bench: Bench, text: str, message: str) -> None:
    """The table is named, and what cannot be."""
    bench.write("pins.yaml", text)
    ended = bench.plan("tables.json", *ON_FOUR, "--constraints", "pins.yaml")
    assert message in ended.err
    assert ended.code == MALFORMED


def test_another_kind_of_file_is_told_by_its_kind(bench: Bench) -> None:
    """A plan or a run config given for a table list: the command for it is named."""
    bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    bench.write("run.yaml", "data: {dir: x}\ntables: {a: {num_embeddings: 8, embedding_dim: 8}}\n")
    for name, command in (("plan.json", "`plan show plan.json`"), ("run.yaml", "`shardemb plan")):
        ended = bench.plan(name, *ON_FOUR)
        assert command in ended.err and ended.code == MALFORMED


# ------------------------------------------------------------------ the verbs


def test_show_is_the_plan_again(bench: Bench) -> None:
    """What `plan` printed, `show` prints again, for people and for programs."""
    first = bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    assert bench.plan("show", "plan.json").out == first.out
    assert bench.made("show", "plan.json") == json.loads(Path("plan.json").read_text())


@pytest.mark.parametrize("verb", [["show"], ["diff", "good.json"], ["export"]])
def test_a_plan_edited_by_hand(bench: Bench, verb: list[str]) -> None:
    """Every verb refuses it, and says what to do instead."""
    bench.plan("tables.json", *ON_FOUR, "--out", "good.json")
    document = json.loads(Path("good.json").read_text())
    document["tables"]["days"]["shards"][0]["rank"] ^= 1
    bench.write("bad.json", json.dumps(document))
    ended = bench.plan(*verb, "bad.json")
    assert "bad.json was changed after it was made" in ended.err
    assert (ended.code, ended.out) == (MALFORMED, "")


def test_html_pages(bench: Bench) -> None:
    """plan, show and sweep write a page beside what they print."""
    pytest.importorskip("plotly")
    bench.made("tables.json", *ON_FOUR, "--out", "plan.json", "--html", "plan.html")
    bench.made("show", "plan.json", "--html", "show.html")
    assert Path("plan.html").read_text() == Path("show.html").read_text()
    bench.made(
        "sweep", "tables.json", "--kinds", "H100", "--devices", "1,2", "--html", "sweep.html"
    )
    assert "H100" in Path("sweep.html").read_text()


def test_torchrec_and_back(bench: Bench) -> None:
    """An exported plan comes back as the plan it was, but for the bound, which no one proved."""
    bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    to_file = bench.made("export", "plan.json", "--out", "torchrec.json")
    assert to_file["tables"] == len(TABLES)
    document = json.loads(Path("torchrec.json").read_text())
    assert document == bench.plan("export", "plan.json", "--format", "torchrec").document
    bench.made("import", "torchrec.json", "--tables", "tables.json", *ON_FOUR, "--out", "back.json")
    difference = bench.made("diff", "plan.json", "back.json")
    assert difference["predicted"].keys() == {"bound_ms", "gap_percent"}
    assert difference["tables"] == {} and difference["devices"] == []


def test_the_module_of_an_export(bench: Bench) -> None:
    """With --module the plan is TorchRec's plan of a whole model."""
    bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    document = bench.plan("export", "plan.json", "--module", "tables.ebc").document
    assert document["plan"].keys() == {"tables.ebc"}


IMPORT_MISTAKES = {
    "missing": (None, MALFORMED, "cannot read the plan torchrec.json: No such file"),
    "not JSON": ("{", MALFORMED, "torchrec.json is not JSON"),
    "no object": ("[]", MALFORMED, "torchrec.json is no plan of TorchRec's"),
    "other tables": (
        '{"other": {"sharding_type": "row_wise", "compute_kernel": "fused"}}',
        IMPOSSIBLE,
        "the plan is for other tables",
    ),
}


@pytest.mark.parametrize(
    ("text", "code", "message"), IMPORT_MISTAKES.values(), ids=IMPORT_MISTAKES.keys()
)
def test_a_wrong_import(bench: Bench, text: str | None, code: int, message: str) -> None:
    """The file is named, and what is wrong with it."""
    if text is not None:
        bench.write("torchrec.json", text)
    ended = bench.plan("import", "torchrec.json", "--tables", "tables.json", *ON_FOUR)
    assert message in ended.err
    assert (ended.code, ended.out) == (code, "")


def test_an_unknown_format(bench: Bench) -> None:
    """--format lists what there is."""
    bench.plan("tables.json", *ON_FOUR, "--out", "plan.json")
    ended = bench.plan("export", "plan.json", "--format", "onnx")
    assert "--format 'onnx': choose torchrec" in ended.err and ended.code == MALFORMED


# ------------------------------------------------------------------ a light command

WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchrec", "ray", "fbgemm_gpu"):
    sys.modules[name] = None  # as where it is not installed
sys.argv = ["planner", "plan", *sys.argv[1:]]
try:
    runpy.run_module("planner", run_name="__main__", alter_sys=False)
except SystemExit as ended:
    assert not ended.code
print([name for name in ("plotly", "shardemb", "launch") if name in sys.modules], file=sys.stderr)
"""


def test_no_torch_is_needed(bench: Bench) -> None:
    """`python -m planner plan` works without torch, and loads neither charts nor shardemb."""
    arguments = [str(bench.folder / "tables.json"), *ON_FOUR, "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(ended.stdout)["tables"].keys() == {table["name"] for table in TABLES}
    assert ended.stderr.strip() == "[]"
