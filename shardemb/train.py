"""One worker: `python -m shardemb.train CONFIG [key=value ...]`, for torchrun or `shardemb`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from planner import Plan, RequestError, Topology
from shardemb.config import RunConfig, load_config
from shardemb.failure import has_launcher, report_failures
from shardemb.planning import plan_run
from shardemb.quiet import silence_libraries
from shardemb.run_directory import RunDirectory, summarize, without_nan

if TYPE_CHECKING:
    from shardemb.data.order import Window
    from shardemb.data.parquet import ParquetReader
    from shardemb.metrics.evaluation import Evaluation
    from shardemb.metrics.run_log import RunLog
    from shardemb.trainer import Progress, Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    with report_failures() as outcome:
        config_path, *overrides = (sys.argv[1:] if arguments is None else arguments) or [""]
        if not config_path or config_path.startswith("-"):
            raise RequestError("usage: python -m shardemb.train CONFIG [KEY=VALUE]...")
        silence_libraries()
        run(load_config(config_path, overrides))
    return outcome.exit_code


def run(config: RunConfig) -> None:
    """Plan, shard, train, evaluate; every rank calls it, and rank 0 writes the run directory."""
    import torch
    import torch.distributed as dist

    from shardemb.models import build_model
    from shardemb.process_group import process_group
    from shardemb.sharding.shard_model import current_topology, shard_model
    from shardemb.trainer import Trainer

    with process_group(config.launch.device) as device:
        topology = current_topology()
        _tell(f"reading the footers of {config.data.dir}")
        train_data = _reader(config, "train")
        test_data = _reader(config, "test") if "test" in config.data.splits() else None
        _tell("reading the first batches")
        _try_first_batch(train_data, test_data)
        _tell("building the model")
        torch.manual_seed(config.seed)
        model = build_model(config)
        plan = _agree_on_plan(config, topology)
        directory = RunDirectory(config, plan) if dist.get_rank() == 0 else None
        _tell(f"sharding {len(plan.tables)} tables")
        sharded = shard_model(
            model, plan, config.train.table_optimizer, device=device, seed=config.seed
        )
        trainer = Trainer(sharded, config.train.dense_optimizer)
        _tell(f"training on {topology.world_size} x {device.type}")
        with directory or nullcontext():
            progress, evaluation = _train(config, trainer, train_data, test_data, directory)
            result = _result(plan, progress, evaluation)
            if config.data.on_error == "skip":
                result["skipped_rows"] = _skipped_rows(train_data, test_data)
            if directory:
                result = without_nan(result)
                directory.write_result(result)
                if not has_launcher():
                    print(summarize(config, result))


def _tell(stage: str) -> None:
    """One line on rank 0 for each thing that takes its time before the first step."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(stage, file=sys.stderr, flush=True)


def _try_first_batch(*readers: ParquetReader | None) -> None:
    """Have a mistake that is everywhere in the data told now: the test split is read last."""
    for reader in readers:
        if reader:
            batches = reader.epoch()
            next(batches)
            batches.close()


def _skipped_rows(*readers: ParquetReader | None) -> int:
    """Of the damaged row groups that any rank came upon; a collective."""
    import torch.distributed as dist

    own = {window for reader in readers if reader for window in reader.skipped}
    ranks: list[set[Window]] = [set()] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return sum(window.rows for window in set().union(*ranks))


def _train(
    config: RunConfig,
    trainer: Trainer,
    train_data: ParquetReader,
    test_data: ParquetReader | None,
    directory: RunDirectory | None,
) -> tuple[Progress, Evaluation | None]:
    steps = config.train.epochs * train_data.steps_per_epoch
    with _log(directory, min(steps, config.train.max_steps or steps)) as log:
        progress = trainer.train(
            train_data,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            report_every=config.train.log_every,
            report=log.report if log else None,
        )
        if log and test_data:
            log.evaluating()
        evaluation = trainer.evaluate(test_data.epoch()) if test_data else None
        if log and evaluation:
            log.evaluated(evaluation, progress.step)
    return progress, evaluation


def _reader(config: RunConfig, split: str) -> ParquetReader:
    from shardemb.data.parquet import ParquetReader
    from shardemb.data.schema import BatchSchema

    return ParquetReader(
        config.data.split(split),
        BatchSchema.from_config(config),
        batch_size=config.train.batch_size,
        shuffle=config.data.shuffle and split == "train",
        seed=config.seed,
        skip_damaged=config.data.on_error == "skip",
    )


def _agree_on_plan(config: RunConfig, topology: Topology) -> Plan:
    """Rank 0's plan, on every rank."""
    import torch.distributed as dist

    plan = [plan_run(config, topology) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(plan, src=0)
    assert plan[0] is not None
    return plan[0]


def _log(directory: RunDirectory | None, steps: int) -> RunLog | nullcontext[None]:
    if directory is None:
        return nullcontext()
    from shardemb.metrics.run_log import RunLog

    return RunLog(directory, steps)


def _result(plan: Plan, progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "samples": progress.samples,
        "samples_per_second": progress.samples_per_second,
        "data_wait_fraction": progress.data_wait_fraction,
        "train_loss": progress.train_loss,
        "world_size": plan.topology.world_size,
        "plan_fingerprint": plan.fingerprint,
        "checkpoint": None,
        "eval": asdict(evaluation) if evaluation else None,
    }


def _exit(code: int) -> NoReturn:
    """End at once: gloo's threads may still be freeing tensors, and one that does so after Python
    is gone aborts the process. It happened to one finished run in thirty."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
