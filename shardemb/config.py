"""RunConfig: the whole run in one validated YAML file. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapSerializer,
    field_validator,
    model_validator,
)

from planner import RequestError, ShardingRule, TableSpec, UserError
from planner.constraints import TableConstraint
from planner.cost.shipped import profile_path, shipped
from planner.geometry import ShardingType
from planner.plan import Objective
from planner.request import COST_MODELS
from planner.strict_yaml import read_yaml
from planner.tables import DataType
from planner.validation import explain, nearest
from shardemb.metrics.catalog import TaskMetric, metrics_of
from shardemb.optimizer_config import (
    DenseOptimizerConfig,
    Freeze,
    GradientClippingConfig,
    ScheduleConfig,
    TableOptimizerConfig,
)
from shardemb.precision_config import CommunicationConfig, PrecisionConfig
from shardemb.pretrained_config import PretrainedConfig
from shardemb.section import Section as _Section
from shardemb.tasks import LossOrName, Task, TaskConfig
from shardemb.yaml_config import apply_overrides, expand_keys, expand_names


class DenseConfig(_Section):
    """Numeric columns that go into the model as they are."""

    columns: list[str] = Field(default_factory=list, description="names; I{1..13} is a range")
    transform: Literal["none", "log"] = Field(
        default="none", description="log: sign(x) * log(1 + |x|), for counts"
    )
    null_value: float = Field(default=0.0, description="stands for a null, after the transform")

    @field_validator("columns")
    @classmethod
    def _expand(cls, columns: list[str]) -> list[str]:
        return _each_once(expand_names(columns))


class FeatureConfig(_Section):
    """How one sparse feature is read."""

    column: str | None = Field(default=None, description="Parquet column; default: its own name")
    ids: Literal["as_is", "hash", "vocabulary"] = Field(
        default="as_is",
        description="as_is: ids are rows of the table; hash: any id, hashed; vocabulary: values of "
        "a file are rows 0, 1, ...",
    )
    hash_seed: int = Field(default=0, ge=0, lt=2**63)
    num_hashes: int = Field(
        default=1, gt=0, description="rows that each id is hashed to, for tables far too small"
    )
    vocabulary: str | None = Field(
        default=None, description="Parquet file with a column `value`, or text, a value a line"
    )
    oov_rows: int = Field(
        default=1, gt=0, description="rows after the vocabulary's that all other values share"
    )
    weights: str | None = Field(default=None, description="column of weights, one for each id")
    null_row: int | None = Field(
        default=None, ge=0, description="row that stands for a null id; default: a null has no id"
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> FeatureConfig:
        if (self.vocabulary is None) is (self.ids == "vocabulary"):
            raise ValueError("`ids: vocabulary` and the file `vocabulary` go together; name both")
        if self.num_hashes > 1 and self.ids != "hash":
            raise ValueError(f"num_hashes: ids are {self.ids}; set `ids: hash`, or leave it out")
        return self


class DataConfig(_Section):
    """The data set: a folder with train/, test/ and perhaps valid/, each of Parquet files."""

    dir: str = Field(description="a folder, a glob of folders, or a URL: s3://bucket/folder")
    label: str = Field(default="label", description="a column, where there are no train.tasks")
    group: str | None = Field(
        default=None,
        description="column of integers or text: rows with one value, a user or a session, are "
        "ranked among each other",
    )
    dense: DenseConfig = DenseConfig()
    features: dict[str, FeatureConfig] = Field(
        default_factory=dict, description="only where a feature is not simply a column of ids"
    )
    shuffle: bool = Field(default=True, description="row groups and rows, anew each epoch")
    stats: Path | None = Field(
        default=None, description="stats.json of `shardemb data stats`: pooling and reuse, to plan"
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="skip: leave out row groups that are damaged, and count them"
    )

    @field_validator("features", mode="before")
    @classmethod
    def _expand(cls, features: Any) -> Any:
        return expand_keys(features) if isinstance(features, dict) else features

    def splits(self) -> list[str]:
        """`train`, and `test` where the data set has one."""
        return ["train", "test"] if self.has_split("test") else ["train"]

    def has_split(self, name: str) -> bool:
        from shardemb.data.sources import has_folder  # here: the planner does without Arrow

        return has_folder(self.split(name))

    def split(self, name: str) -> str:
        """Where the files of a split are."""
        return f"{self.dir.rstrip('/')}/{name}"


def _nothing_required(schema: dict[str, Any]) -> None:
    """For editors: what a key leaves out may come from the name range that it is in."""
    schema.pop("required", None)


class TableConfig(_Section):
    """One embedding table."""

    model_config = ConfigDict(json_schema_extra=_nothing_required)

    num_embeddings: int = Field(gt=0)
    embedding_dim: int = Field(gt=0, multiple_of=4, description="FBGEMM reads vectors of four")
    feature_names: list[str] | None = Field(
        default=None, description="features that look it up; default: the one of its name"
    )
    pooling: Literal["sum", "mean"] = "sum"
    pooling_factor: float = Field(default=1.0, ge=0, description="mean ids a row, for planning")
    dtype: DataType = "fp32"
    optimizer: TableOptimizerConfig | None = Field(
        default=None, description="what it leaves out is train.table_optimizer's"
    )
    frozen: Freeze = Field(
        default=None, description="true: never trained; or from when until when it is not"
    )
    pretrained: PretrainedConfig | None = Field(
        default=None, description="vectors that it begins with, unless a checkpoint has it"
    )

    @field_validator("feature_names")
    @classmethod
    def _used(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and not names:
            raise ValueError("no feature uses this table: name one, or remove the table")
        return None if names is None else _each_once(expand_names(names))


class ModelConfig(_Section):
    """`dlrm`, `dcn_v2`, or `package.module:callable` with its own arguments."""

    name: str = "dlrm"
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the model")


def _rule(value: Any) -> Any:
    return {"sharding_type": value} if isinstance(value, str) else value


class _PartialRule(ShardingRule):
    model_config = ConfigDict(title="ShardingRule", json_schema_extra=_nothing_required)


Rule = Annotated[
    ShardingRule, BeforeValidator(_rule, json_schema_input_type=ShardingType | _PartialRule)
]


def _rule_or_auto(value: Any) -> Any:
    return None if value == "auto" else _rule(value)


RuleOrAuto = Annotated[
    ShardingRule | None,
    BeforeValidator(
        _rule_or_auto, json_schema_input_type=Literal["auto"] | ShardingType | _PartialRule
    ),
    WrapSerializer(lambda rule, to_dict: "auto" if rule is None else to_dict(rule)),
]


class ShardingConfig(_Section):
    """The planner's choice or a sharding type for all tables, others for some, or a plan."""

    default: RuleOrAuto = Field(
        default=None, description="auto: the planner chooses for the tables not named below"
    )
    tables: dict[str, Rule] = Field(default_factory=dict)
    constraints: dict[str, TableConstraint] = Field(
        default_factory=dict, description="what the planner may choose for some tables"
    )
    hardware: str = Field(
        default="auto",
        description="what the planner counts on: a known kind (cpu, A100-80GB ...), a topology "
        "file with its hardware, or auto: the GPU that nvidia-smi lists, else cpu",
    )
    cost: str = Field(
        default="analytic",
        description="analytic, torchrec, the profile.json that `shardemb profile` wrote, or a "
        "machine measured for shardemb: cpu-2core",
    )
    objective: Objective = "stages"
    plan: Path | None = Field(default=None, description="a plan.json to use instead of all this")

    @field_validator("cost")
    @classmethod
    def _is_known(cls, cost: str) -> str:
        if cost not in COST_MODELS and not profile_path(cost):
            known = (*COST_MODELS, *shipped(), "a profile (FILE.json)")
            raise ValueError(f"{cost} is no cost model{nearest(cost, known)}")
        return cost

    @field_validator("tables", mode="before")
    @classmethod
    def _expand(cls, tables: Any) -> Any:
        if not isinstance(tables, dict):
            return tables
        return expand_keys({name: _rule(value) for name, value in tables.items()})

    @field_validator("constraints", mode="before")
    @classmethod
    def _expand_constraints(cls, constraints: Any) -> Any:
        return expand_keys(constraints) if isinstance(constraints, dict) else constraints

    @model_validator(mode="after")
    def _each_table_once(self) -> ShardingConfig:
        for name in self.constraints.keys() & self.tables.keys():
            raise ValueError(
                f"constraints.{name}: sharding.tables.{name} fixes this table already; "
                "remove one of them"
            )
        return self


class TrainConfig(_Section):
    batch_size: int = Field(default=2048, gt=0, description="rows a step on each rank")
    epochs: int = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0, description="stop after so many steps")
    deterministic: bool = Field(
        default=False,
        description="the same bits whether or not the run was stopped; somewhat slower",
    )
    log_every: int = Field(default=20, gt=0, description="steps between lines in metrics.jsonl")
    loss: LossOrName | None = Field(
        default=None, description="of data.label; default: binary_cross_entropy"
    )
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="instead of `loss`: several losses, each of its own labels, summed",
    )
    table_optimizer: TableOptimizerConfig = TableOptimizerConfig()
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clipping: GradientClippingConfig = GradientClippingConfig()
    precision: PrecisionConfig = PrecisionConfig()
    communication: CommunicationConfig = CommunicationConfig()


class EarlyStoppingConfig(_Section):
    """Stop where `evaluation.metric` does not get better any more."""

    patience: int = Field(gt=0, description="evaluations without a better one before it stops")
    min_delta: float = Field(default=0.0, ge=0, description="what counts as better is more by this")
    restore_best: bool = Field(default=True, description="end with the weights of the best step")


class EvaluationConfig(_Section):
    """How the model is judged: on the test split at the end, and while it trains."""

    metrics: tuple[str, ...] = Field(
        default=(),
        description="of each task that they fit, TASK/METRIC of one; default: those of the losses",
    )
    every_steps: int | None = Field(
        default=None, gt=0, description="also while training; default: at its end alone"
    )
    split: Literal["test", "valid"] = Field(
        default="test", description="what is evaluated while training"
    )
    metric: str | None = Field(
        default=None, description="that says which step is best; default: the first of metrics"
    )
    early_stopping: EarlyStoppingConfig | None = None

    @model_validator(mode="after")
    def _while_training(self) -> EvaluationConfig:
        for key in ("metric", "early_stopping"):
            if getattr(self, key) is not None and self.every_steps is None:
                raise ValueError(
                    f"{key}: nothing is evaluated while training; set evaluation.every_steps"
                )
        return self


class CheckpointConfig(_Section):
    """Copies of the training state to go on from."""

    dir: str | None = Field(
        default=None, description="a folder or URL; default: checkpoints/ in the run directory"
    )
    every_steps: int | None = Field(
        default=None, gt=0, description="default: one checkpoint, at the end of training"
    )
    keep_last: int = Field(default=2, gt=0)
    keep_best: bool = Field(
        default=False,
        description="save each step whose evaluation is the best so far, and keep the last of them",
    )
    asynchronous: bool = Field(
        default=True,
        description="train on while a copy is written; false: no memory for a copy is needed",
    )
    resume: str | None = Field(
        default=None,
        description="go on in the run directory `output`: latest, best, or a checkpoint's name",
    )
    start_from: str | None = Field(
        default=None,
        description="begin a new run with another's checkpoint, a run directory's newest or one of "
        "them: data are read from their beginning, steps count on",
    )
    grow_tables: bool = Field(
        default=False,
        description="tables may have more rows than the checkpoint's: new ones begin as in a new "
        "run",
    )


class LaunchConfig(_Section):
    nproc_per_node: int = Field(default=2, gt=0, description="workers on this machine")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where every worker can have its own GPU"
    )
    max_restarts: int = Field(
        default=3, ge=0, description="on many hosts: times that failed workers are started again"
    )
    hang_seconds: float = Field(
        default=20, gt=5, description="a worker, or a host, that is silent for so long is given up"
    )
    wait_seconds: float = Field(
        default=300, gt=0, description="for hosts: at the start, and for one that was lost"
    )
    metrics_port: int | None = Field(
        default=None, gt=0, lt=65536, description="of rank 0, for Prometheus; default: none"
    )
    metrics_host: str = Field(default="127.0.0.1", description="the address of metrics_port")


class ElasticConfig(_Section):
    """How many hosts a run may go on with when some are lost or come back."""

    min_hosts: int | None = Field(default=None, gt=0, description="default: all it began with")
    max_hosts: int | None = Field(default=None, gt=0, description="default: all it began with")

    @model_validator(mode="after")
    def _in_order(self) -> ElasticConfig:
        if self.min_hosts and self.max_hosts and self.min_hosts > self.max_hosts:
            raise ValueError(f"min_hosts: {self.min_hosts} is more than max_hosts {self.max_hosts}")
        return self


class RunConfig(_Section):
    """Everything about a run. `shardemb train --print-schema` prints its JSON Schema."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    output: Path = Field(default=Path("runs/latest"), description="the run directory")
    data: DataConfig
    tables: dict[str, TableConfig] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()
    elastic: ElasticConfig = ElasticConfig()

    @model_validator(mode="before")
    @classmethod
    def _complete_optimizers(cls, document: Any) -> Any:
        """Each table's own has what it leaves out from that of all tables."""
        tables = _below(document, "tables")
        default = _below(_below(document, "train"), "table_optimizer")
        completed = {
            name: {**table, "optimizer": {**default, **own}}
            for name, table in tables.items()
            if isinstance(own := _below(tables, name).get("optimizer"), dict)
        }
        return {**document, "tables": {**tables, **completed}} if completed else document

    @field_validator("tables", mode="before")
    @classmethod
    def _expand(cls, tables: Any) -> Any:
        return expand_keys(tables) if isinstance(tables, dict) else tables

    @model_validator(mode="after")
    def _freezing_ends(self) -> RunConfig:
        for name, table in self.tables.items():
            late = table.frozen and table.frozen.never_ends(self.train.max_steps, self.train.epochs)
            if late:
                raise ValueError(
                    f"tables.{name}.frozen: the run ends before {late} is over, so the table never "
                    "trains; say `frozen: true`, or end it earlier"
                )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> RunConfig:
        used = {name for table in self.table_specs() for name in table.feature_names}
        for name in self.data.features:
            if name not in used:
                raise ValueError(
                    f"data.features.{name}: no table uses this feature{nearest(name, used)}"
                )
        for name in self.sharding.tables:
            if name not in self.tables:
                raise ValueError(
                    f"sharding.tables.{name}: there is no such table{nearest(name, self.tables)}"
                )
        for table in self.table_specs():
            for name in table.feature_names:
                row = self.feature(name).null_row
                if row is not None and row >= table.num_embeddings:
                    raise ValueError(
                        f"data.features.{name}.null_row: row {row} is outside table "
                        f"{table.name}, whose rows are 0 to {table.num_embeddings - 1}"
                    )
        return self

    @model_validator(mode="after")
    def _losses_and_metrics_agree(self) -> RunConfig:
        if self.train.loss and self.train.tasks:
            raise ValueError(
                "train.loss: with train.tasks each task has a loss of its own; remove one of them"
            )
        try:
            metrics = self.metrics
        except ValueError as error:
            raise ValueError(f"evaluation.metrics: {error}") from error
        if self.data.group is None:
            for task in self.tasks:
                if task.is_ranking:
                    key = f"train.tasks.{task.name}.loss" if self.train.tasks else "train.loss"
                    raise ValueError(f"{key}: {task.loss} ranks rows in groups; set data.group")
            for metric in metrics:
                if metric.kind.is_grouped:
                    raise ValueError(
                        f"evaluation.metrics: {metric.key} is of rows in groups; set data.group"
                    )
        if self.evaluation.every_steps:
            _ = self.best_metric
        elif self.checkpoint.keep_best:
            raise ValueError(
                "checkpoint.keep_best: nothing is evaluated while training; set "
                "evaluation.every_steps"
            )
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the model learns; one task, of `data.label`, unless there are `train.tasks`."""
        if self.train.tasks:
            return tuple(Task.of(name, task) for name, task in self.train.tasks.items())
        loss = {"loss": self.train.loss} if self.train.loss else {}
        return (Task.of(self.data.label, TaskConfig(**loss)),)

    @property
    def metrics(self) -> list[TaskMetric]:
        return metrics_of(self.tasks, self.evaluation.metrics)

    @property
    def best_metric(self) -> TaskMetric:
        """Which says what step is best."""
        metrics = self.metrics
        name = self.evaluation.metric or metrics[0].key
        for metric in metrics:
            if metric.key == name and metric.kind.best:
                return metric
        known = [metric.key for metric in metrics if metric.kind.best]
        if name in [metric.key for metric in metrics]:
            raise ValueError(
                f"evaluation.metric: neither more nor less of {name} is better; choose from "
                f"{', '.join(known)}"
            )
        raise ValueError(
            f"evaluation.metric: {name} is none of evaluation.metrics{nearest(name, known)}"
        )

    def splits(self) -> list[str]:
        """Those that the run reads; UserError where the one to evaluate while training is none."""
        splits = self.data.splits()
        if self.evaluation.every_steps is None:
            return splits
        split = self.evaluation.split
        if not self.data.has_split(split):
            raise UserError(
                f"evaluation.every_steps: data.dir {self.data.dir} has no {split}/ folder to "
                "evaluate on (evaluation.split)"
            )
        return list(dict.fromkeys([*splits, split]))

    @property
    def keeps_best(self) -> bool:
        stopping = self.evaluation.early_stopping
        return self.checkpoint.keep_best or (stopping is not None and stopping.restore_best)

    def feature(self, name: str) -> FeatureConfig:
        return self.data.features.get(name, FeatureConfig())

    def table_optimizer(self, name: str) -> TableOptimizerConfig:
        return self.tables[name].optimizer or self.train.table_optimizer

    def _hashes(self, features: list[str]) -> float:
        """Rows that an id is hashed to, on average over the features."""
        return sum(self.feature(name).num_hashes for name in features) / len(features)

    @property
    def checkpoint_dir(self) -> str:
        return self.checkpoint.dir or str(self.output / "checkpoints")

    def table_specs(self) -> list[TableSpec]:
        """The tables as the planner knows them."""
        return [
            TableSpec(
                name=name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=tuple(table.feature_names or [name]),
                pooling_factor=table.pooling_factor * self._hashes(table.feature_names or [name]),
                dtype=table.dtype,
                weighted=any(
                    self.feature(feature).weights for feature in table.feature_names or [name]
                ),
                optimizer=self.table_optimizer(name).name,
            )
            for name, table in self.tables.items()
        ]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run config.

    `overrides` are `key.sub=value` strings. RequestError lists every wrong key by its full path.
    """
    document = read_yaml(Path(path))
    apply_overrides(document, overrides)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, RunConfig))
        raise RequestError(f"{path} is not a valid config:\n{lines}") from error


def _below(document: Any, key: str) -> dict[str, Any]:
    """The section `key`; empty where there is none, or something else."""
    section = document.get(key) if isinstance(document, dict) else None
    return section if isinstance(section, dict) else {}


def _each_once(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice")
    return names
