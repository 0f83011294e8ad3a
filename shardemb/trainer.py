"""Trainer: the road of a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from planner import UserError
from shardemb.best_step import BestStep
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.dense_precision import bf16_pays
from shardemb.freezing import Freezing
from shardemb.losses import Loss
from shardemb.metrics.catalog import TaskMetric
from shardemb.metrics.evaluation import Evaluation, Evaluator
from shardemb.metrics.stage_clock import STEPS, StageClock
from shardemb.metrics.stragglers import Straggler, StragglerWatch
from shardemb.metrics.wall_time import WallTime
from shardemb.optim import clip_dense_gradients, make_optimizer
from shardemb.optimizer_config import (
    DenseOptimizerConfig,
    GradientClippingConfig,
    ScheduleConfig,
)
from shardemb.precision_config import PrecisionConfig
from shardemb.schedule import LearningRates
from shardemb.sharding.ids_ahead import IdsAhead
from shardemb.sharding.shard_model import ShardedModel
from shardemb.supervision import Supervision
from shardemb.tasks import Task

# The first steps build buckets, thread pools and caches: speed is measured after them.
WARMUP_STEPS = 10
TIMED_STEPS = range(WARMUP_STEPS, WARMUP_STEPS + STEPS)  # whose embedding stages are timed
TIMED_EVERY = 10  # after those: to see who waits for whom

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where training stands; the same on every rank."""

    step: int
    samples: int  # rows so far, over all ranks
    train_loss: float  # mean over the rows since the last report, over all ranks
    samples_per_second: float  # over all ranks, since the warm-up
    data_wait_fraction: float  # of this rank's time
    step_ms: float  # of this rank, since the warm-up
    seconds: dict[str, float]  # of this rank, by part: see WallTime
    restarts: int
    straggler: Straggler | None


@dataclass(frozen=True)
class Validation:
    """Evaluation while training, after every so many steps; `report` gets it, its step and
    whether that is the best so far."""

    reader: ParquetReader
    every_steps: int
    report: Callable[[Evaluation, int, bool], None] | None = None


class Trainer:
    """Trains a sharded model on `tasks`, by default on one binary label.

    The loss is the mean over the rows of all ranks (see `Loss`); `model(batch)` gives
    [batch_size, outputs], or [batch_size] where there is one: a logit for each label, for
    cross-entropy one for each class. `metrics` are evaluated, by default those of the losses;
    `best` is told of validations and stops training.
    """

    def __init__(
        self,
        model: ShardedModel,
        dense_optimizer: DenseOptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        *,
        gradient_clipping: GradientClippingConfig | None = None,
        precision: PrecisionConfig | None = None,
        tasks: tuple[Task, ...] = (Task(),),
        metrics: Sequence[TaskMetric] | None = None,
        best: BestStep | None = None,
    ) -> None:
        self.model = model
        self.tasks, self.metrics, self.best = tasks, metrics, best
        self.loss = Loss(tasks)
        self.device = model.device
        self.clock = StageClock(model, self.device)
        self.ids_ahead = IdsAhead(model)
        self._following: tuple[Batch, Batch] | None = None  # as given, and on the device
        self.stragglers = StragglerWatch(self.clock)
        self.wall_time = WallTime()
        self.step, self.samples = 0, 0  # trained so far; samples are rows over all ranks
        self.world_size = dist.get_world_size()
        self.dense_optimizer = dense_optimizer or DenseOptimizerConfig()
        self.optimizer = make_optimizer(
            model, model.planner_plan, self.dense_optimizer, model.table_optimizers
        )
        self.rates = LearningRates(model, self.optimizer, schedule or ScheduleConfig())
        self.freezing = Freezing(model, self.optimizer)
        self.gradient_clipping = gradient_clipping or GradientClippingConfig()
        precision = precision or PrecisionConfig()
        # Told by the first step where it is auto.
        self.dense_precision: Literal["fp32", "bf16"] | None = (
            None if precision.dense == "auto" else precision.dense
        )

    def train_step(self, batch: Batch, following: Batch | None = None) -> torch.Tensor:
        """One step on this rank's `batch`; this rank's part of the loss, summed over its rows.

        The ids of `following`, the batch of the next step, are exchanged meanwhile. All ranks give
        one, or none.
        """
        self.optimizer.zero_grad()
        batch = self._on_device(batch)
        if following is not None:
            self._following = following, following.to(self.device, non_blocking=True)
            self.ids_ahead.begin(self._following[1].sparse)
        with self._autocast(batch):
            outputs = self._outputs(batch)
        self.ids_ahead.send()
        loss_sum = self.loss(outputs, batch)
        # Gradients are averaged over ranks, so this makes them those of the mean over all rows.
        (loss_sum * (self.world_size / max(batch.global_rows, 1))).backward()
        clip_dense_gradients(self.optimizer, self.gradient_clipping)
        with self.freezing.held():
            self.optimizer.step()
        return loss_sum.detach()

    def train(
        self,
        reader: ParquetReader,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        report_every: int = 20,
        report: Callable[[Progress], None] | None = None,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int | None = None,
        validation: Validation | None = None,
        supervision: Supervision | None = None,
    ) -> Progress | None:
        """Train for `epochs` in all, or up to step `max_steps` if that is less, or until `best`
        has been waited for long enough.

        A trainer and a reader that go on from a checkpoint train what is left; None where that is
        nothing. `checkpoints` gets one every so many steps, after the last and, if it keeps the
        best, after each that is. `report` is called after the first step, every so many, the last
        and before each validation and checkpoint. `supervision` may make any step the last.
        UserError when the loss is no finite number any more.
        """
        last = self.last_step(reader, epochs, max_steps)
        if last < 1:
            raise ValueError(f"{epochs} epochs and max_steps {max_steps} leave no step to train")
        self.model.train()
        self.wall_time.started()
        self.wall_time.reached(self.step)
        meter, progress = _Meter(self.samples, self.wall_time), None
        first = self.step + 1
        batches = _with_position(reader, epochs)
        pairs = _with_following(batches)
        while self.step < last and not self.has_stopped:
            (batch, position), following = meter.wait_for(pairs)
            self.rates.set(self.step + 1, last)
            self.freezing.set(self.step + 1, position[0] + 1)
            number = self.step - first + 1
            # A step that is timed exchanges its ids itself.
            is_ahead = self.step + 1 < last and not _is_timed(number + 1)
            timed = self.clock.step() if _is_timed(number) else nullcontext()
            with self.wall_time.part("training"), timed:
                loss_sum = self.train_step(batch, following if is_ahead else None)
            meter.add(loss_sum, batch.global_rows, position)
            self.step, self.samples = self.step + 1, meter.samples
            self.wall_time.reached(self.step)
            if supervision and supervision.stops_after(self.step):
                last = self.step
            is_saved = checkpoints is not None and _is_due(self.step, last, checkpoint_every)
            is_validated = validation is not None and self.step % validation.every_steps == 0
            is_reported = _is_due(self.step, last, report_every) or self.step == first
            if is_reported or is_saved or is_validated:
                with self.wall_time.part("training"):
                    progress = meter.progress(self.step, self.stragglers.find())
                if not math.isfinite(progress.train_loss):
                    raise UserError(self._why_not_finite(meter, reader, checkpoints))
                if report:
                    report(progress)
            if validation is not None and is_validated:
                with meter.paused(), self.wall_time.part("evaluation"):
                    is_best = self._validate(validation)
                keeps = checkpoints is not None and checkpoints.keep_best
                is_saved |= (is_best and keeps) or self.has_stopped
            if checkpoints is not None and is_saved:
                state = reader.state(*position)
                trains_on = self.step < last and not self.has_stopped
                with self.wall_time.part("checkpoints"):
                    checkpoints.save(self, state, trains_on=trains_on)
            if self.step == first + WARMUP_STEPS - 1:
                meter.start_steady_state()
        batches.close()
        self.ids_ahead.drop()
        if checkpoints:
            with self.wall_time.part("checkpoints"):
                checkpoints.wait()
        return progress

    @property
    def has_stopped(self) -> bool:
        """Whether training ends before its last step: early stopping."""
        return self.best is not None and self.best.should_stop

    def _validate(self, validation: Validation) -> bool:
        """Whether this step is the best so far."""
        evaluation, is_best = self.evaluate(validation.reader.epoch()), False
        if self.best:
            # Rank 0's value, so that all ranks go on or stop, whatever the last bit of theirs is.
            value = [evaluation.metrics[self.best.metric]]
            dist.broadcast_object_list(value)
            is_best = self.best.add(self.step, value[0])
        if validation.report:
            validation.report(evaluation, self.step, is_best)
        self.model.train()
        return is_best

    def _why_not_finite(
        self, meter: _Meter, reader: ParquetReader, checkpoints: Checkpoints | None
    ) -> str:
        """The first step whose loss is no number, its rows, and where to go on; a collective."""
        before, (epoch, steps) = meter.first_not_finite()
        if checkpoints:
            checkpoints.wait()
        kept = checkpoints.last_good() if checkpoints else "no checkpoint was asked for"
        return (
            f"the training loss is no finite number at step {self.step - before}: lower the "
            "learning rates (train.table_optimizer.lr, train.dense_optimizer.lr), or correct the "
            f"data, if it is their fault: {'; '.join(reader.sources(epoch, steps))}. To go on with "
            f"checkpoint.resume: {kept}"
        )

    def last_step(self, reader: ParquetReader, epochs: int, max_steps: int | None) -> int:
        """The number of the step that training ends with."""
        left = sum(reader.steps_left(epoch) for epoch in range(reader.first_epoch, epochs))
        return min(self.step + left, max_steps or self.step + left)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Metrics over the rows of all ranks; every rank must give as many batches."""
        self.model.eval()
        evaluator = Evaluator(self.device, self.tasks, self.metrics)
        for batch in batches:
            batch = batch.to(self.device, non_blocking=True)
            evaluator.update(self._outputs(batch), batch)
        return evaluator.compute()

    def _autocast(self, batch: Batch) -> torch.autocast:
        if self.dense_precision is None:
            rows = len(batch.mask) * self.world_size
            pays = bf16_pays(self.optimizer, rows, self.device)
            self.dense_precision = "bf16" if pays else "fp32"
        is_bf16 = self.dense_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def _on_device(self, batch: Batch) -> Batch:
        if self._following is not None and self._following[0] is batch:
            return self._following[1]
        return batch.to(self.device, non_blocking=True)

    def _outputs(self, batch: Batch) -> torch.Tensor:
        """[batch_size, num_outputs]."""
        self.ids_ahead.current = batch.sparse
        outputs, rows, width = self.model(batch), len(batch.mask), self.loss.num_outputs
        if outputs.shape != (rows, width) and (outputs.shape, width) != ((rows,), 1):
            needed = "one logit" if width == 1 else f"{width} numbers"
            raise UserError(
                f"the model gave a tensor of shape {list(outputs.shape)} for a batch of "
                f"{rows} rows: it must give {needed} a row"
            )
        return outputs.reshape(rows, width)


Position = tuple[int, int]  # the arguments of ParquetReader.state


def _with_position(
    reader: ParquetReader, epochs: int
) -> Generator[tuple[Batch, Position], None, None]:
    """Batches, and where the reader stands after each."""
    for epoch in range(reader.first_epoch, epochs):
        for steps, batch in enumerate(reader.epoch(epoch), start=1):
            yield batch, (epoch, steps)


def _with_following(
    batches: Iterator[tuple[Batch, Position]],
) -> Iterator[tuple[tuple[Batch, Position], Batch | None]]:
    """Each with the batch after it."""
    item = next(batches, None)
    while item is not None:
        after = next(batches, None)
        yield item, after[0] if after else None
        item = after


def _is_due(step: int, last: int, every: int | None) -> bool:
    return step == last or (every is not None and step % every == 0)


def _is_timed(step: int) -> bool:
    """`step` counts from the first of these workers, which is 0."""
    return step in TIMED_STEPS or (step >= TIMED_STEPS.stop and step % TIMED_EVERY == 0)


class _Meter:
    """Counts rows, loss, time and the part of it spent waiting for data."""

    def __init__(self, samples: int, wall_time: WallTime) -> None:
        self._wall_time = wall_time
        self._losses: list[torch.Tensor] = []  # since the last report, of this rank
        self._positions: list[Position] = []
        self._loss_rows = 0
        self.samples = samples
        self.start_steady_state()

    def start_steady_state(self) -> None:
        self._since, self._waited, self._rows_before = time.perf_counter(), 0.0, self.samples
        self._steps = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is no time of training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def wait_for(self, batches: Iterator[T]) -> T:
        start = time.perf_counter()
        with self._wall_time.part("data_wait"):
            item = next(batches)
        self._waited += time.perf_counter() - start
        return item

    def add(self, loss_sum: torch.Tensor, global_rows: int, position: Position) -> None:
        self._losses.append(loss_sum)
        self._positions.append(position)
        self._loss_rows += global_rows
        self.samples += global_rows
        self._steps += 1

    def progress(self, step: int, straggler: Straggler | None) -> Progress:
        """A collective: the loss is summed over ranks, and counted anew from here."""
        self._reported = torch.stack(self._losses).double(), self._positions
        loss = self._reported[0].sum()
        dist.all_reduce(loss)
        mean = loss.item() / max(self._loss_rows, 1)
        self._losses, self._positions, self._loss_rows = [], [], 0
        seconds = time.perf_counter() - self._since
        return Progress(
            step=step,
            samples=self.samples,
            train_loss=mean,
            samples_per_second=(self.samples - self._rows_before) / seconds,
            data_wait_fraction=self._waited / seconds,
            step_ms=1000 * seconds / self._steps,
            seconds=self._wall_time.seconds(),
            restarts=self._wall_time.restarts,
            straggler=straggler,
        )

    def first_not_finite(self) -> tuple[int, Position]:
        """Of the steps last reported, on any rank: how many steps came after, and where it is."""
        losses, positions = self._reported
        wrong = (~losses.isfinite()).to(torch.int32)
        dist.all_reduce(wrong)
        first = int(wrong.nonzero()[0])
        return len(positions) - 1 - first, positions[first]
