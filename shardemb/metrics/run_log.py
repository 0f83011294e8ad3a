"""What one rank reports while it trains: a progress line, metrics.jsonl, TensorBoard, and metrics
for Prometheus."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import cached_property
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch.utils.tensorboard import SummaryWriter

from planner import UserError
from shardemb.config import RunConfig
from shardemb.metrics.evaluation import Evaluation
from shardemb.metrics.exported import MetricsServer
from shardemb.metrics.terminal import terminal_console
from shardemb.run_directory import RunDirectory, without_nan
from shardemb.summary import summarize_evaluation
from shardemb.trainer import Progress

# Seconds between lines where there is no terminal to redraw a bar on.
LINE_SECONDS = 5.0


class RunLog:
    """A context manager; its methods are called by rank 0 alone.

    The first report creates the run directory.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory, total_steps: int, first_step: int = 1
    ) -> None:
        self._config, self._directory, self._first_step = config, directory, first_step
        self._path = directory.path / "metrics.jsonl"
        self._console = terminal_console()
        self._total = total_steps
        is_ours = self._console.file is sys.stderr  # what else is printed goes above the bar
        self._bar = ProgressBar(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=is_ours,
            redirect_stderr=is_ours,
        )
        self._task = self._bar.add_task("train", total=total_steps, figures="first step")
        self._last_line = 0.0
        self._slowest: int | None = None
        host, port = config.launch.metrics_host, config.launch.metrics_port
        self._server = None if port is None else MetricsServer(host, port)

    def __enter__(self) -> RunLog:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._server:
            self._server.close()
        if "_tensorboard" in vars(self):
            self._tensorboard.close()

    @cached_property
    def _tensorboard(self) -> SummaryWriter:
        return SummaryWriter(str(self._directory.path / "tensorboard"), purge_step=self._first_step)

    def begin(self) -> None:
        """Create the run directory, if that is not done."""
        if "_tensorboard" not in vars(self):
            self._directory.create()
            _ = self._tensorboard

    def report(self, progress: Progress) -> None:
        self.begin()
        line = {"kind": "train", "time": time.time(), **asdict(progress)}
        self._write(line)
        if self._server:
            self._server.show(line)
        for name in ("train_loss", "samples_per_second", "data_wait_fraction"):
            self._tensorboard.add_scalar(f"train/{name}", getattr(progress, name), progress.step)
        figures = (
            f"{progress.samples_per_second:,.0f} samples/s  loss {progress.train_loss:.4f}  "
            f"data wait {progress.data_wait_fraction:.1%}"
        )
        self._bar.update(self._task, completed=progress.step, figures=figures)
        self._line(f"step {progress.step}/{self._total}  {figures}", progress.step == self._total)
        slowest = progress.straggler.rank if progress.straggler else None
        if progress.straggler and slowest != self._slowest:
            self._console.print(str(progress.straggler), highlight=False, soft_wrap=True)
        self._slowest = slowest

    def evaluating(self) -> None:
        self._console.print("evaluating on the test split", highlight=False)

    def validated(self, evaluation: Evaluation, step: int, is_best: bool) -> None:
        """Of the model while it trains."""
        split = self._config.evaluation.split
        self.evaluated(evaluation, step, split)
        found = summarize_evaluation(self._config, without_nan(evaluation.to_json()), split)
        best = ", the best so far" if is_best else ""
        self._console.print(f"step {step}: {found}{best}", highlight=False, soft_wrap=True)

    def evaluated(self, evaluation: Evaluation, step: int, split: str = "test") -> None:
        record = {"kind": "eval", "time": time.time(), "step": step, "split": split}
        self._write({**record, **evaluation.to_json()})
        for name, value in evaluation.metrics.items():
            folder = "eval" if split == "test" else split
            self._tensorboard.add_scalar(f"{folder}/{name}", value, step)

    def _line(self, text: str, is_last: bool) -> None:
        if self._console.is_terminal:
            return
        if is_last or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _write(self, record: dict[str, object]) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(without_nan(record)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
