"""Sections of a run config: what changes tables and dense parameters, how fast, and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WrapSerializer, model_validator

from planner.tables import TableOptimizerName
from planner.validation import nearest
from shardemb.section import Section

DenseOptimizerName = Literal["sgd", "adam", "adamw", "adagrad"]

# They count steps, and keep two moments.
ADAMS = ("adam", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb")
WITH_DECAY = (*ADAMS, "rowwise_adagrad")


def _one_of(names: Any) -> BeforeValidator:
    known = get_args(names)

    def check(name: Any) -> Any:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"there is no such optimizer{nearest(name, known)}")
        return name

    return BeforeValidator(check)


Beta = Annotated[float, Field(ge=0, lt=1)]


class TableOptimizerConfig(Section):
    """The optimizer of embedding tables, run inside backward."""

    name: Annotated[TableOptimizerName, _one_of(TableOptimizerName)] = "rowwise_adagrad"
    lr: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0, description="of all but sgd")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="of the Adams and LAMBs")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="of all but sgd and adagrad, decoupled; of rows that a step looks up",
    )
    max_gradient: float | None = Field(
        default=None,
        gt=0,
        description="limits each element of the gradient of each embedding that the model is given",
    )

    @model_validator(mode="after")
    def _has_decay(self) -> TableOptimizerConfig:
        if self.weight_decay and self.name not in WITH_DECAY:
            raise ValueError(
                f"weight_decay: {self.name} has none; choose {', '.join(WITH_DECAY[:-1])} or "
                f"{WITH_DECAY[-1]}, or leave it out"
            )
        return self


class FreezeConfig(Section):
    """Steps or epochs, counted from 1, in which a table stands still: those after `from_`, up to
    `until_` and with it; all where none is named."""

    from_step: int | None = Field(default=None, gt=0, description="trained up to this step")
    until_step: int | None = Field(default=None, gt=0, description="the last step without training")
    from_epoch: int | None = Field(default=None, gt=0, description="trained up to this epoch")
    until_epoch: int | None = Field(default=None, gt=0, description="the last without training")

    @model_validator(mode="after")
    def _one_span(self) -> FreezeConfig:
        steps, epochs = (self.from_step, self.until_step), (self.from_epoch, self.until_epoch)
        if any(steps) and any(epochs):
            raise ValueError("steps and epochs do not go together; name one of them")
        for unit, (first, last) in {"step": steps, "epoch": epochs}.items():
            if first and last and first >= last:
                raise ValueError(
                    f"from_{unit} {first} is not before until_{unit} {last}: nothing is frozen"
                )
        return self

    def holds(self, step: int, epoch: int) -> bool:
        """Whether the table stands still in this step, of this epoch."""
        if self.from_epoch or self.until_epoch:
            return _is_within(epoch, self.from_epoch, self.until_epoch)
        return _is_within(step, self.from_step, self.until_step)

    def never_ends(self, max_steps: int | None, epochs: int) -> str | None:
        """The bound that a run of so many steps and epochs does not reach, as `until_step 100`;
        None where there is none."""
        if self.until_step and not self.from_step and max_steps and self.until_step >= max_steps:
            return f"until_step {self.until_step}"
        if self.until_epoch and not self.from_epoch and self.until_epoch >= epochs:
            return f"until_epoch {self.until_epoch}"
        return None


def _is_within(now: int, after: int | None, until: int | None) -> bool:
    return now > (after or 0) and (until is None or now <= until)


def _freeze(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return FreezeConfig() if value else None
    if not value or not isinstance(value, dict | FreezeConfig):
        raise ValueError("say true, or from when until when, for example {until_step: 1000}")
    return value


Freeze = Annotated[
    FreezeConfig | None,
    BeforeValidator(_freeze, json_schema_input_type=bool | FreezeConfig | None),
    WrapSerializer(
        lambda value, to_dict: (
            value is not None if value in (None, FreezeConfig()) else to_dict(value)
        )
    ),
]


class DenseOptimizerConfig(Section):
    """The optimizer of everything that is not an embedding table."""

    name: Annotated[DenseOptimizerName, _one_of(DenseOptimizerName)] = "adam"
    lr: float = Field(default=0.001, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)


class GradientClippingConfig(Section):
    """Limits the gradients of dense parameters; those of tables have `max_gradient`."""

    norm: float | None = Field(
        default=None, gt=0, description="of all dense gradients together, which keep direction"
    )
    value: float | None = Field(default=None, gt=0, description="of each element")

    @model_validator(mode="after")
    def _not_both(self) -> GradientClippingConfig:
        if self.norm and self.value:
            raise ValueError("norm and value do not go together; name one of them")
        return self


class ScheduleConfig(Section):
    """How the learning rates of tables and dense parameters change over the steps."""

    name: Literal["constant", "polynomial", "cosine", "step"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, description="from 0 to the full rates, linearly")
    decay_start_step: int | None = Field(
        default=None, ge=0, description="default: after the warm-up"
    )
    decay_steps: int | None = Field(
        default=None,
        gt=0,
        description="polynomial, cosine: how long, default to the end; step: steps between changes",
    )
    power: float = Field(default=2.0, gt=0, description="of polynomial")
    gamma: float = Field(default=0.5, gt=0, le=1, description="of step: factor of each change")
    final: float = Field(
        default=0.0, ge=0, le=1, description="of polynomial and cosine: what is left at the end"
    )

    @model_validator(mode="after")
    def _in_order(self) -> ScheduleConfig:
        start = self.decay_start_step
        if start is not None and start < self.warmup_steps:
            raise ValueError(
                f"decay_start_step: {start} is within the warm-up of {self.warmup_steps} steps; "
                "start the decay after it"
            )
        if self.name == "step" and self.decay_steps is None:
            raise ValueError("decay_steps: `step` needs the number of steps between changes")
        return self
