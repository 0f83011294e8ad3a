from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import RequestError
from planner.strict_yaml import read_yaml
from shardemb.config import RunConfig, load_config
from shardemb.data.schema import BatchSchema
from shardemb.yaml_config import expand_keys, expand_names

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))

BASE = """
output: runs/x
data:
  dir: data/x
  dense: {columns: ["I{1..3}"]}
  features:
    "C{1..3}": {ids: hash, null_row: 0}
    C2: {null_row: 1}
tables:
  "C{1..4}": {num_embeddings: 100, embedding_dim: 16}
  C2: {num_embeddings: 7}
sharding:
  default: table_wise
  tables: {"C{1..3}": {sharding_type: column_wise, column_shards: 2}, C3: row_wise}
train:
  batch_size: 64
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(BASE)
    return file


def _error(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the first where that is only the heading."""
    with pytest.raises(RequestError) as caught:
        load_config(path, overrides)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    return lines[1:] if lines[0] == f"{path} is not a valid config:" else lines


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["C{1..3}", "D"], ["C1", "C2", "C3", "D"]),
        (["C{9..11}"], ["C9", "C10", "C11"]),
        (["C{5..5}"], ["C5"]),
        (["{0..1}x{2..3}"], ["0x2", "0x3", "1x2", "1x3"]),
        (["C{08..11}_id"], ["C08_id", "C09_id", "C10_id", "C11_id"]),
        (["C{1.3}", "C{a..b}", "{}"], ["C{1.3}", "C{a..b}", "{}"]),
    ],
)
def test_name_ranges(names: list[str], expected: list[str]):
    """Both ends are in a range, zeros in front stay, and what is no range is a plain name."""
    assert expand_names(names) == expected


def test_keys_add_up_field_by_field():
    """By hand: a later range wins over an earlier one, an exact key over both, wherever it is."""
    mapping = {
        "C3": {"b": 30},
        "C{1..3}": {"a": 1, "b": 1, "c": 1},
        "C{2..4}": {"b": 2},
        "D": 5,
        "D{1..2}": 6,
    }
    before = copy.deepcopy(mapping)
    assert expand_keys(mapping) == {
        "C1": {"a": 1, "b": 1, "c": 1},
        "C2": {"a": 1, "b": 2, "c": 1},
        "C3": {"a": 1, "b": 30, "c": 1},
        "C4": {"b": 2},
        "D1": 6,
        "D2": 6,
        "D": 5,
    }
    assert mapping == before


def test_ranges_in_every_section(path: Path):
    """Tables, features and sharding rules are expanded; exact keys win field by field."""
    config = load_config(path)
    assert config.data.dense.columns == ["I1", "I2", "I3"]
    sizes = {name: (t.num_embeddings, t.embedding_dim) for name, t in config.tables.items()}
    assert sizes == {"C1": (100, 16), "C2": (7, 16), "C3": (100, 16), "C4": (100, 16)}
    null_rows = {name: f.null_row for name, f in config.data.features.items()}
    assert null_rows == {"C1": 0, "C2": 1, "C3": 0}
    assert {feature.ids for feature in config.data.features.values()} == {"hash"}
    rules = {name: rule.sharding_type for name, rule in config.sharding.tables.items()}
    assert rules == {"C1": "column_wise", "C2": "column_wise", "C3": "row_wise"}


def test_overrides_set_any_key(path: Path):
    """Values are YAML; sections that the file lacks are made."""
    config = load_config(
        path,
        [
            "train.batch_size=8",
            "output=runs/a=b",
            "launch.nproc_per_node=3",
            "data.dense.columns=[x, 'I{1..2}']",
            "train.table_optimizer={name: sgd, lr: 1e-3}",
            "model.args.layers=[8, 4]",
            "seed=5",
            "seed=6",
        ],
    )
    assert (config.train.batch_size, config.launch.nproc_per_node, config.seed) == (8, 3, 6)
    assert config.output == Path("runs/a=b")
    assert config.data.dense.columns == ["x", "I1", "I2"]
    assert (config.train.table_optimizer.name, config.train.table_optimizer.lr) == ("sgd", 0.001)
    assert config.model.args == {"layers": [8, 4]}


@pytest.mark.parametrize(
    ("overrides", "dims"),
    [
        (["tables.C1.embedding_dim=8"], [8, 16, 16, 16]),
        (["tables.C2.embedding_dim=8"], [16, 8, 16, 16]),
        (["tables.C{1..4}.embedding_dim=8"], [8, 8, 8, 8]),
        (["tables.C{1..3}.embedding_dim=8"], [8, 8, 8, 16]),
        (["tables.C{2..3}.embedding_dim=8", "tables.C3.embedding_dim=4"], [16, 8, 4, 16]),
        (["tables.C3.embedding_dim=4", "tables.C{2..3}.embedding_dim=8"], [16, 8, 8, 16]),
    ],
)
def test_an_override_wins_over_all_of_the_file(path: Path, overrides: list[str], dims: list[int]):
    """A range on the command line sets each of its names, whether the file has them in the same
    range, in another or by name; of two overrides the later wins. Nothing else changes."""
    before, config = load_config(path), load_config(path, overrides)
    assert [table.embedding_dim for table in config.tables.values()] == dims
    assert list(config.tables) == list(before.tables)
    sizes = [table.num_embeddings for table in config.tables.values()]
    assert sizes == [100, 7, 100, 100]


def test_a_range_wins_over_exact_keys_of_the_file(path: Path):
    """The size of C2, which the file gives by name, and rules that it gives as plain text."""
    overrides = ["tables.C{1..4}.num_embeddings=50", "sharding.tables.C{1..3}=data_parallel"]
    config = load_config(path, overrides)
    assert {table.num_embeddings for table in config.tables.values()} == {50}
    assert {rule.sharding_type for rule in config.sharding.tables.values()} == {"data_parallel"}


def test_an_override_changes_no_alias(path: Path):
    """Two tables that are one YAML anchor are two tables: overriding one leaves the other."""
    path.write_text(
        "data: {dir: x}\n"
        "tables:\n"
        "  a: &t {num_embeddings: 5, embedding_dim: 4}\n"
        "  b: *t\n"
        "  c: {<<: *t, embedding_dim: 8}\n"
    )
    config = load_config(path, ["tables.a.num_embeddings=6"])
    sizes = [(table.num_embeddings, table.embedding_dim) for table in config.tables.values()]
    assert sizes == [(6, 4), (5, 4), (5, 8)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "write key.sub=value, for example train.batch_size=512"),
        ("=5", "write key.sub=value"),
        ("train.batch_size.x=5", "train.batch_size is 64, it has no keys below it"),
        ("sharding.default.ranks=[0]", "sharding.default is 'table_wise', it has no keys below"),
        ("model.args=[1", "the value is not valid YAML: expected ',' or ']'"),
        ("model.args={a: 1, a: 2}", "the value is not valid YAML: 'a' is given twice"),
        ("tables.C{3..1}.embedding_dim=4", "name range 'tables.C{3..1}.embedding_dim' is empty"),
        ("seed=2024-13-99", "month must be in 1..12"),
    ],
)
def test_malformed_overrides(path: Path, override: str, message: str):
    """The error repeats the override and says what is wrong with it."""
    assert _error(path, override)[0].startswith(f"override {override!r}: {message}")


@pytest.mark.parametrize(
    ("override", "below", "message"),
    [
        ("train.batch_sise=5", "", "unknown key; did you mean batch_size?"),
        ("trian={batch_size: 5}", "", "unknown key; did you mean train?"),
        ("tables.C1.embeding_dim=8", "", "unknown key; did you mean embedding_dim?"),
        ("data.features.C1={id: hash}", ".id", "unknown key; did you mean ids?"),
        (
            "sharding.tables.C1={sharding: row_wise}",
            ".sharding",
            "unknown key; did you mean sharding_type?",
        ),
        (
            "sharding.default={sharding_type: row_wise, rank: [0]}",
            ".rank",
            "unknown key; did you mean ranks?",
        ),
        (
            "data.features.C1={ids: as_is, num_hashes: 2}",
            "",
            "num_hashes: ids are as_is; set `ids: hash`, or leave it out "
            "(found {'ids': 'as_is', 'null_row': 0, 'num_hashes': 2})",
        ),
        (
            "data.features.C1={vocabulary: words.txt}",
            "",
            "`ids: vocabulary` and the file `vocabulary` go together; name both "
            "(found {'ids': 'hash', 'null_row': 0, 'vocabulary': 'words.txt'})",
        ),
        (
            "train.table_optimizer.learning_rate=1",
            "",
            "unknown key; known are betas, eps, lr, max_gradient, name, weight_decay",
        ),
        (
            "train.table_optimizer={name: sgd, weight_decay: 0.1}",
            "",
            "weight_decay: sgd has none; choose adam, partial_rowwise_adam, lamb, "
            "partial_rowwise_lamb or rowwise_adagrad, or leave it out "
            "(found {'name': 'sgd', 'weight_decay': 0.1})",
        ),
        (
            "train.table_optimizer.lr=-0.1",
            "",
            "Input should be greater than or equal to 0 (found -0.1)",
        ),
        (
            "train.dense_optimizer.lr=-1",
            "",
            "Input should be greater than or equal to 0 (found -1)",
        ),
        ("tables.C1.optimizer.lr=-1", "", "Input should be greater than or equal to 0 (found -1)"),
        (
            "tables.C1.optimizer.name=addam",
            "",
            "there is no such optimizer; did you mean adam? (found 'addam')",
        ),
        ("tables.C1.optimizer.beta=1", "", "unknown key; did you mean betas?"),
        (
            "tables.C1.optimizer={name: adagrad, weight_decay: 1}",
            "",
            "weight_decay: adagrad has none; choose adam, partial_rowwise_adam, lamb, "
            "partial_rowwise_lamb or rowwise_adagrad, or leave it out "
            "(found {'name': 'adagrad', 'weight_decay': 1})",
        ),
        (
            "tables.C1.frozen=5",
            "",
            "say true, or from when until when, for example {until_step: 1000} (found 5)",
        ),
        (
            "tables.C1.frozen={}",
            "",
            "say true, or from when until when, for example {until_step: 1000} (found {})",
        ),
        ("tables.C1.frozen.until_stp=5", "", "unknown key; did you mean until_step?"),
        ("tables.C1.frozen.until_step=0", "", "Input should be greater than 0 (found 0)"),
        (
            "tables.C1.frozen={from_step: 9, until_step: 9}",
            "",
            "from_step 9 is not before until_step 9: nothing is frozen "
            "(found {'from_step': 9, 'until_step': 9})",
        ),
        (
            "tables.C1.frozen={from_step: 9, until_epoch: 1}",
            "",
            "steps and epochs do not go together; name one of them "
            "(found {'from_step': 9, 'until_epoch': 1})",
        ),
        (
            "tables.C1.frozen={until_epoch: 1}",
            "",
            "the run ends before until_epoch 1 is over, so the table never trains; "
            "say `frozen: true`, or end it earlier",
        ),
        ("train.gradient_clipping.norm=0", "", "Input should be greater than 0 (found 0)"),
        ("train.gradient_clipping.value=-1", "", "Input should be greater than 0 (found -1)"),
        (
            "train.gradient_clipping={norm: 1, value: 1}",
            "",
            "norm and value do not go together; name one of them (found {'norm': 1, 'value': 1})",
        ),
        ("train.table_optimizer.max_gradient=0", "", "Input should be greater than 0 (found 0)"),
        (
            "train.precision.dense=fp16",
            "",
            "Input should be 'auto', 'fp32' or 'bf16' (found 'fp16')",
        ),
        (
            "train.communication.forward=int8",
            "",
            "Input should be 'fp32', 'fp16' or 'bf16' (found 'int8')",
        ),
        ("train.table_optimizer.betas=[0.9, 1]", ".1", "Input should be less than 1 (found 1)"),
        (
            "sharding.cost=analytical",
            "",
            "analytical is no cost model; did you mean analytic? (found 'analytical')",
        ),
        ("checkpoint.every_steps=0", "", "Input should be greater than 0 (found 0)"),
        ("tables.C9={embedding_dim: 8}", ".num_embeddings", "required, but not given"),
        ("train.batch_size=0", "", "Input should be greater than 0 (found 0)"),
        ("train.batch_size=", "", "Input should be a valid integer (found None)"),
        ("train.table_optimizer.lr=.nan", "", "Input should be a finite number (found nan)"),
        ("train.dense_optimizer.lr=.inf", "", "Input should be a finite number (found inf)"),
        (
            "train.dense_optimizer.name=adm",
            "",
            "there is no such optimizer; did you mean adam? (found 'adm')",
        ),
        ("tables.C1.embedding_dim=6", "", "Input should be a multiple of 4 (found 6)"),
        (
            "tables.C1.feature_names=[]",
            "",
            "no feature uses this table: name one, or remove the table (found [])",
        ),
        ("tables.C1.feature_names=[a, a]", "", "a is named twice (found ['a', 'a'])"),
        (
            "data.dense.columns=['I{2..1}']",
            "",
            "name range 'I{2..1}' is empty: write the smaller number first (found ['I{2..1}'])",
        ),
        ("data.dense.columns=[I1, 'I{1..2}']", "", "I1 is named twice (found ['I1', 'I{1..2}'])"),
        (
            "sharding.default=rowwise",
            ".sharding_type",
            "Input should be 'table_wise', 'row_wise', 'column_wise', 'table_row_wise', "
            "'table_column_wise', 'grid_shard' or 'data_parallel' (found 'rowwise')",
        ),
        ("sharding.tables.C9=row_wise", "", "there is no such table; known are C1, C2, C3, C4"),
        ("data.features.X={ids: hash}", "", "no table uses this feature; known are C1, C2, C3, C4"),
        (
            "data.features.C2.null_row=7",
            "",
            "row 7 is outside table C2, whose rows are 0 to 6",
        ),
        (
            "tables={}",
            "",
            "Dictionary should have at least 1 item after validation, not 0 (found {})",
        ),
        ("tables=5", "", "Input should be a valid dictionary (found 5)"),
    ],
)
def test_every_mistake_is_told_by_its_full_path(
    path: Path, override: str, below: str, message: str
):
    """The key's path from the top (`below` what the override names, where the value has keys),
    what is wrong, and what was found or what is near it."""
    assert _error(path, override) == [f"{override.partition('=')[0]}{below}: {message}"]


BCE = "binary_cross_entropy"
EARLY = "{every_steps: 5, early_stopping: {patience: 2}}"
LOSS_MISTAKES = [
    (["train.loss=msee"], "train.loss: msee is no loss; did you mean mse? (found 'msee')"),
    (
        ["train.tasks.a.loss=bp"],
        "train.tasks.a.loss: bp is no loss; did you mean bpr? (found 'bp')",
    ),
    (
        ["train.loss=cross_entropy"],
        "train.loss: `name: cross_entropy` and `num_classes` go together; give both "
        "(found {'name': 'cross_entropy'})",
    ),
    (
        ["train.loss={name: mse, num_classes: 3}"],
        "train.loss: `name: cross_entropy` and `num_classes` go together; give both "
        "(found {'name': 'mse', 'num_classes': 3})",
    ),
    (
        ["train.tasks.a={loss: bpr, labels: [a, b]}"],
        "train.tasks.a: labels: bpr takes one column, not 2; make a task of each "
        "(found {'loss': 'bpr', 'labels': ['a', 'b']})",
    ),
    (
        ["train.loss=mse", "train.tasks.a.loss=mae"],
        "train.loss: with train.tasks each task has a loss of its own; remove one of them",
    ),
    (["train.loss=bpr"], "train.loss: bpr ranks rows in groups; set data.group"),
    (
        ["train.tasks.a.loss=bpr"],
        "train.tasks.a.loss: bpr ranks rows in groups; set data.group",
    ),
    (
        ["evaluation.metrics=[log_loss]"],
        "evaluation.metrics: log_loss is no metric; did you mean logloss?",
    ),
    (
        ["evaluation.metrics=[mae]"],
        f"evaluation.metrics: mae is a metric of mse, mae, and the loss is {BCE}; choose from "
        "auc, gauc, logloss, normalized_entropy, calibration, accuracy, hr, recall, precision, "
        "mrr, ndcg",
    ),
    (
        ["evaluation.metrics=[ndcg]"],
        "evaluation.metrics: ndcg: how many of the first rows count? Write ndcg@10, for example",
    ),
    (["evaluation.metrics=[auc@5]"], "evaluation.metrics: auc@5: auc has no cut; write auc"),
    (
        ["evaluation.metrics=[clicks/auc]", "train.tasks.click.loss=mse"],
        "evaluation.metrics: clicks/auc: there is no task clicks; did you mean click?",
    ),
    (
        ["evaluation.metrics=[gauc]"],
        "evaluation.metrics: gauc is of rows in groups; set data.group",
    ),
    (
        ["evaluation.early_stopping.patience=2"],
        "evaluation: early_stopping: nothing is evaluated while training; set "
        "evaluation.every_steps (found {'early_stopping': {'patience': 2}})",
    ),
    (
        ["checkpoint.keep_best=true"],
        "checkpoint.keep_best: nothing is evaluated while training; set evaluation.every_steps",
    ),
    (
        [f"evaluation={EARLY}", "evaluation.metric=mse"],
        "evaluation.metric: mse is none of evaluation.metrics; known are auc, logloss, "
        "normalized_entropy",
    ),
    (
        [f"evaluation={EARLY}", "evaluation.metrics=[calibration, auc]"],
        "evaluation.metric: neither more nor less of calibration is better; choose from auc",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), LOSS_MISTAKES)
def test_losses_and_metrics_that_do_not_fit(path: Path, overrides: list[str], message: str):
    """The key, what is wrong with it, what is near it or would fit."""
    assert _error(path, *overrides) == [message]


def test_tasks_and_their_metrics(path: Path):
    """By hand: the label's task by default, or those named, a label of the task's name if no other
    is; metrics of each task that they fit, with its name where there are several."""
    config = load_config(
        path, ["data.label=click", "train.loss={name: cross_entropy, num_classes: 5}"]
    )
    assert [(t.name, t.loss, t.labels, t.num_outputs) for t in config.tasks] == [
        ("click", "cross_entropy", ("click",), 5)
    ]
    assert [metric.key for metric in config.metrics] == ["logloss", "accuracy"]
    config = load_config(
        path,
        [
            "data.group=user",
            "train.tasks.click.weight=2",
            "train.tasks.tags.labels=['tag_{1..3}', other]",
            "train.tasks.stars.loss=mse",
            "evaluation.metrics=[logloss, stars/mae, calibration, ndcg@5]",
            "evaluation.every_steps=5",
            "evaluation.metric=tags/logloss",
        ],
    )
    assert [(t.name, t.labels, t.weight) for t in config.tasks] == [
        ("click", ("click",), 2.0),
        ("tags", ("tag_1", "tag_2", "tag_3", "other"), 1.0),
        ("stars", ("stars",), 1.0),
    ]
    assert [metric.key for metric in config.metrics] == [
        *("click/logloss", "tags/logloss", "stars/mae"),
        *("click/calibration", "tags/calibration", "stars/calibration"),
        *("click/ndcg@5", "tags/ndcg@5"),
    ]
    assert config.best_metric.key == "tags/logloss"
    schema = BatchSchema.from_config(config)
    ranges = [(label.column, label.lowest, label.highest < 2) for label in schema.labels]
    assert ranges[0] == ("click", 0, True) and ranges[-1][0] == "stars" and ranges[-1][1] < -1e38
    assert schema.columns[:7] == ["click", "tag_1", "tag_2", "tag_3", "other", "stars", "I1"]
    assert "user" in schema.columns


def test_all_mistakes_are_told_at_once(path: Path):
    """One run shows every wrong key."""
    lines = _error(path, "seed=-1", "train.epochs=x", "launch.devise=cpu")
    assert {line.split(":")[0] for line in lines} == {"seed", "train.epochs", "launch.devise"}


def test_a_missing_section_is_told(path: Path):
    """A config needs data and tables; a dir is needed in data."""
    path.write_text("data: {}\n")
    assert _error(path) == [
        "data.dir: required, but not given",
        "tables: required, but not given",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is given twice, on lines 1 and 2"),
        ("tables:\n  a: {embedding_dim: 4}\n  a: {}\n", "'a' is given twice, on lines 2 and 3"),
        ("tables:\n  1: {}\n  '1': {}\n", "'1' is given twice, on lines 2 and 3"),
        ("a: [1\n", "expected ',' or ']'"),
        ("? [1, 2]\n: 3\n", "a key must be plain text"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("seed: 2024-13-99\n", "month must be in 1..12"),
        ("a: *b\n", "found undefined alias"),
        ("", "must hold `key: value` lines, found a NoneType"),
        ("- a\n", "must hold `key: value` lines, found a list"),
        ("a\x00b", "special characters are not allowed"),
        ("a: " + "[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_yaml_that_is_refused(path: Path, text: str, message: str):
    """The message has the file and what is wrong; a key given twice is not silently dropped."""
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    """No file, a folder, and bytes that are no text: the path and the reason."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name, reason in [
        ("absent", "No such file"),
        (".", "Is a directory"),
        ("binary", "not a text"),
    ]:
        with pytest.raises(RequestError, match=reason):
            read_yaml(tmp_path / name)


def test_keys_are_text_as_written(path: Path):
    """Tables named 1, 007, no and 1e5 keep their names; only values have YAML's types."""
    path.write_text(
        "data: {dir: x}\ntables:\n"
        + "".join(
            f"  {n}: {{num_embeddings: 5, embedding_dim: 4}}\n" for n in ["1", "007", "no", "1e5"]
        )
    )
    config = load_config(path, ["tables.1.num_embeddings=6", "tables.no.num_embeddings=7"])
    sizes = {name: table.num_embeddings for name, table in config.tables.items()}
    assert sizes == {"1": 6, "007": 5, "no": 7, "1e5": 5}


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", ".1e-2", "1e+3", "-1e3"])
def test_numbers_as_people_write_them(path: Path, text: str):
    """Exponents need no dot, also where the model's own arguments say nothing of their type."""
    assert load_config(path, [f"model.args.x={text}"]).model.args == {"x": float(text)}


@pytest.mark.parametrize("config_path", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_our_configs_load_and_round_trip(config_path: Path, tmp_path: Path):
    """Every config we ship is valid, and what a run writes down of it is the same config."""
    config = load_config(config_path)
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def test_a_table_has_what_its_optimizer_leaves_out_from_that_of_all(path: Path):
    """By exact name, range and override; a table without its own has that of all. The planner
    counts the state of each."""
    config = load_config(
        path,
        [
            "train.table_optimizer={name: adam, lr: 0.5, eps: 0.25}",
            "tables.C{1..2}.optimizer={name: sgd}",
            "tables.C2.optimizer.lr=0.125",
            "tables.C3.optimizer={}",
        ],
    )
    found = {name: config.table_optimizer(name) for name in config.tables}
    assert {n: (o.name, o.lr, o.eps) for n, o in found.items()} == {
        "C1": ("sgd", 0.5, 0.25),
        "C2": ("sgd", 0.125, 0.25),
        "C3": ("adam", 0.5, 0.25),
        "C4": ("adam", 0.5, 0.25),
    }
    planned = {spec.name: spec.optimizer for spec in config.table_specs()}
    assert planned == {"C1": "sgd", "C2": "sgd", "C3": "adam", "C4": "adam"}


@pytest.mark.parametrize(
    ("frozen", "steps", "epochs"),
    [
        ("false", set(), set()),
        ("true", {1, 2, 3, 4, 5}, {1, 2, 3}),
        ("{until_step: 2}", {1, 2}, set()),
        ("{from_step: 3}", {4, 5}, set()),
        ("{from_step: 2, until_step: 4}", {3, 4}, set()),
        ("{until_epoch: 1}", set(), {1}),
        ("{from_epoch: 2}", set(), {3}),
    ],
)
def test_when_a_table_is_frozen(path: Path, frozen: str, steps: set[int], epochs: set[int]):
    """By hand: steps and epochs count from 1; what a run writes down says the same."""
    config = load_config(path, [f"tables.C1.frozen={frozen}", "train.epochs=3"])
    freeze = config.tables["C1"].frozen
    of_steps = {step for step in range(1, 6) if freeze and freeze.holds(step, 0)}
    of_epochs = {epoch for epoch in range(1, 4) if freeze and freeze.holds(0, epoch)}
    assert (of_steps or of_epochs) == (steps or epochs)
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_resolved_config_round_trips(path: Path, tmp_path: Path):
    """Overrides, ranges and odd names are all in the resolved file."""
    overrides = ["tables.no={num_embeddings: 3, embedding_dim: 4}", "model.args.x=1e-3"]
    config = load_config(path, overrides)
    written = tmp_path / "resolved.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config and "no" in config.tables


def _accepts(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """A small JSON Schema validator, of the words that our schema uses."""
    if "$ref" in schema:
        return _accepts(definitions[schema["$ref"].rsplit("/", 1)[1]], value, definitions)
    if "anyOf" in schema and not any(_accepts(s, value, definitions) for s in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool,
             "object": dict, "array": list, "null": None | type(None)}  # fmt: skip
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, list):
        return all(_accepts(schema.get("items", {}), item, definitions) for item in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if any(key not in value for key in schema.get("required", [])):
            return False
        if others is False and value.keys() - known.keys():
            return False
        others = others if isinstance(others, dict) else {}
        return all(
            _accepts(known.get(key, others), item, definitions) for key, item in value.items()
        )
    return True


def _schema_accepts(document: Any) -> bool:
    schema = RunConfig.model_json_schema()
    return _accepts(schema, document, schema["$defs"])


@pytest.mark.parametrize("config_path", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_editors_accept_our_configs(config_path: Path):
    """The printed schema takes what people write: rules as plain text, keys that give only what
    their range does not."""
    assert _schema_accepts(yaml.safe_load(config_path.read_text()))


@pytest.mark.parametrize(
    ("section", "accepted"),
    [
        ("sharding: {default: row_wise, tables: {C3: row_wise}}", True),
        ("sharding: {tables: {C3: {sharding_type: row_wise, ranks: [0, 1]}}}", True),
        ("sharding: {tables: {C3: {column_shards: 2}}}", True),
        ("sharding: {tables: {C3: rowwise}}", False),
        ("sharding: {default: {sharding_type: rowwise}}", False),
        ("sharding: {tables: {C3: {shard: row_wise}}}", False),
        ("tables: {C3: {embedding_dim: 4}}", True),
        ("tables: {C3: {embedding_dim: x}}", False),
        ("tables: {C3: {embedding: 4}}", False),
        ("train: {batchsize: 4}", False),
        ("tables: {C3: {optimizer: {lr: 0.1}, frozen: true}}", True),
        ("tables: {C3: {frozen: {until_step: 4}}}", True),
        ("tables: {C3: {frozen: {until: 4}}}", False),
    ],
)
def test_editors_mark_mistakes(section: str, accepted: bool):
    """The schema refuses wrong words and keys, and nothing that loads."""
    document = {"data": {"dir": "x"}, "tables": {}, **yaml.safe_load(section)}
    assert _schema_accepts(document) is accepted
