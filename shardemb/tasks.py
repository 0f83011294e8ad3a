"""What a model learns: tasks, each a loss on label columns. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from planner.validation import nearest
from shardemb.yaml_config import expand_names

LossName = Literal["binary_cross_entropy", "cross_entropy", "mse", "mae", "bpr", "listwise_softmax"]
LOSSES: tuple[str, ...] = get_args(LossName)
RANKING = ("bpr", "listwise_softmax")
ONE_COLUMN = ("cross_entropy", *RANKING)
# Labels are float32: larger numbers of classes would not be told apart.
MOST_CLASSES = 1 << 24


def _known(name: Any) -> Any:
    if isinstance(name, str) and name not in LOSSES:
        raise ValueError(f"{name} is no loss{nearest(name, LOSSES)}")
    return name


class LossConfig(BaseModel):
    """A loss; its name alone is enough where it takes no arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[LossName, BeforeValidator(_known)] = Field(
        default="binary_cross_entropy",
        description="bpr and listwise_softmax rank the rows of each data.group",
    )
    num_classes: int | None = Field(
        default=None, ge=2, le=MOST_CLASSES, description="of cross_entropy: labels are 0, 1 ..."
    )

    @model_validator(mode="after")
    def _has_classes(self) -> LossConfig:
        if (self.num_classes is None) is (self.name == "cross_entropy"):
            raise ValueError("`name: cross_entropy` and `num_classes` go together; give both")
        return self


def _loss(value: Any) -> Any:
    return {"name": _known(value)} if isinstance(value, str) else value


LossOrName = Annotated[
    LossConfig, BeforeValidator(_loss, json_schema_input_type=LossName | LossConfig)
]


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class TaskConfig(BaseModel):
    """One of several things that a model learns at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    loss: LossOrName = LossConfig()
    labels: (
        Annotated[list[str], BeforeValidator(_names, json_schema_input_type=str | list[str])] | None
    ) = Field(
        default=None,
        min_length=1,
        description="columns, default the one of the task's name; the loss of several (multi-label)"
        " is the mean over them",
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss in the sum over tasks")

    @field_validator("labels")
    @classmethod
    def _expand(cls, labels: list[str] | None) -> list[str] | None:
        return None if labels is None else expand_names(labels)

    @model_validator(mode="after")
    def _one_column(self) -> TaskConfig:
        if self.loss.name in ONE_COLUMN and self.labels is not None and len(self.labels) > 1:
            raise ValueError(
                f"labels: {self.loss.name} takes one column, not {len(self.labels)}; make a task "
                "of each"
            )
        return self


@dataclass(frozen=True)
class Task:
    """A loss on columns of `Batch.labels`; the model gives `num_outputs` columns for it."""

    name: str = "label"
    loss: str = "binary_cross_entropy"
    labels: tuple[str, ...] = ("label",)
    num_classes: int | None = None
    weight: float = 1.0

    @classmethod
    def of(cls, name: str, config: TaskConfig) -> Task:
        loss = config.loss
        labels = (name,) if config.labels is None else tuple(config.labels)
        return cls(name, loss.name, labels, loss.num_classes, config.weight)

    @property
    def num_outputs(self) -> int:
        return self.num_classes or len(self.labels)

    @property
    def is_ranking(self) -> bool:
        return self.loss in RANKING

    @property
    def label_range(self) -> tuple[float, float]:
        """The smallest and the largest label."""
        largest = float.fromhex("0x1.fffffep+127")  # of float32
        if self.loss == "binary_cross_entropy":
            return 0, 1
        if self.num_classes is not None:
            return 0, self.num_classes - 1
        return (0 if self.is_ranking else -largest), largest


@dataclass(frozen=True)
class Columns:
    """Where a task's columns are: of the model's outputs, and of `Batch.labels`."""

    task: Task
    outputs: slice
    labels: slice


def columns_of(tasks: tuple[Task, ...]) -> list[Columns]:
    """Those of one task after those of another."""
    columns, output, label = [], 0, 0
    for task in tasks:
        outputs = slice(output, output := output + task.num_outputs)
        labels = slice(label, label := label + len(task.labels))
        columns.append(Columns(task, outputs, labels))
    return columns


def num_outputs(tasks: tuple[Task, ...]) -> int:
    """The width of what a model gives for all of them."""
    return sum(task.num_outputs for task in tasks)
