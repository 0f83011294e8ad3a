"""One worker: `python -m shardemb.train CONFIG [key=value ...]`, for torchrun or `shardemb`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from planner import RequestError, UserError
from shardemb.config import RunConfig, load_config
from shardemb.failure import has_launcher, report_failures
from shardemb.metrics.wall_time import WallTime, split_training
from shardemb.quiet import silence_libraries
from shardemb.run_directory import RunDirectory, is_begun, reports, without_nan
from shardemb.summary import summarize
from shardemb.supervision import StoppedError, Supervision

if TYPE_CHECKING:
    from shardemb.checkpoint.checkpoints import Checkpoints
    from shardemb.checkpoint.manifest import Manifest
    from shardemb.data.order import Window
    from shardemb.data.parquet import ParquetReader
    from shardemb.metrics.run_log import RunLog
    from shardemb.trainer import Progress, Trainer, Validation


def main(arguments: Sequence[str] | None = None) -> int:
    with report_failures() as outcome:
        config_path, *overrides = (sys.argv[1:] if arguments is None else arguments) or [""]
        if not config_path or config_path.startswith("-"):
            raise RequestError("usage: python -m shardemb.train CONFIG [KEY=VALUE]...")
        silence_libraries()
        supervision = Supervision() if Supervision.wanted() else None
        run(load_config(config_path, overrides), supervision)
    return outcome.exit_code


def run(config: RunConfig, supervision: Supervision | None = None) -> None:
    """Plan, shard, train, evaluate; every rank calls it, and rank 0 writes the run directory."""
    import torch.distributed as dist

    from shardemb.build import build_reader, build_trainer, tell
    from shardemb.checkpoint.checkpoints import Checkpoints
    from shardemb.ranks import process_group
    from shardemb.warm_start import warm_start

    wall_time = WallTime.of_launch()
    with process_group(config.launch.device) as device:
        tell(f"reading the footers of {config.data.dir}")
        train_data = build_reader(config, "train")
        others = {name: build_reader(config, name) for name in config.splits() if name != "train"}
        tell("reading the first batches")
        _try_first_batch(train_data, *others.values())
        trainer = build_trainer(config, device)
        trainer.wall_time = wall_time
        plan = trainer.model.planner_plan
        directory = RunDirectory(config, plan) if dist.get_rank() == 0 else None
        checkpoints = Checkpoints(
            config.checkpoint_dir,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.keeps_best,
            asynchronous=config.checkpoint.asynchronous,
        )
        begun = _is_begun(config)
        wanted = "latest" if begun else config.checkpoint.resume
        resumed = _resume(config, wanted, checkpoints, trainer, train_data)
        if directory and begun:
            _recover(config, wall_time)
        if directory and (begun or resumed):
            directory.resume_at(trainer.step)
        if wanted and not resumed:
            tell(f"no checkpoint in {config.checkpoint_dir}: starting from the beginning")
        loaded = resumed or _start_from(config, trainer)
        if supervision:
            supervision.tell(trainer.step)
        if loaded:
            tell(f"going on after step {trainer.step}")
        warm_start(config, trainer.model, loaded)
        tell(f"training on {plan.topology.world_size} x {device.type}")
        with directory or nullcontext():
            result = _train(
                config, trainer, train_data, others, directory, checkpoints, supervision
            )
            if config.data.on_error == "skip":
                result["skipped_rows"] = _skipped_rows(train_data, *others.values())
            if directory:
                result = without_nan(result)
                directory.write_result(result)
                if not has_launcher():
                    print(summarize(config, result))


def _try_first_batch(*readers: ParquetReader) -> None:
    """Have a mistake that is everywhere in the data told now: the test split is read last."""
    for reader in readers:
        batches = reader.epoch()
        next(batches)
        batches.close()


def _skipped_rows(*readers: ParquetReader) -> int:
    """Of the damaged row groups that any rank came upon; a collective."""
    import torch.distributed as dist

    own = {window for reader in readers for window in reader.skipped}
    ranks: list[set[Window]] = [set()] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return sum(window.rows for window in set().union(*ranks))


def _is_begun(config: RunConfig) -> bool:
    """What rank 0 finds, on every rank."""
    import torch.distributed as dist

    begun = [dist.get_rank() == 0 and is_begun(config.output)]
    dist.broadcast_object_list(begun, src=0)
    return begun[0]


def _recover(config: RunConfig, wall_time: WallTime) -> None:
    """Have the seconds go on of the workers that began this run, and failed."""
    reported = reports(config.output / "metrics.jsonl")
    if reported:
        last = reported[-1]
        wall_time.go_on(last["step"], last["time"], last["seconds"], last["restarts"])


def _resume(
    config: RunConfig,
    wanted: str | None,
    checkpoints: Checkpoints,
    trainer: Trainer,
    reader: ParquetReader,
) -> Manifest | None:
    """What the run goes on from, which it does where that is wanted and can be."""
    names: list[str] = []
    if wanted is not None or config.checkpoint.dir is not None:
        names = checkpoints.find()
    if wanted is None:
        checkpoints.refuse_earlier(names)
        return None
    if wanted == "latest" and not names:
        return None
    manifest = checkpoints.load(
        trainer,
        None if wanted == "latest" else wanted,
        grow_tables=config.checkpoint.grow_tables,
    )
    if manifest.weights_only:
        return manifest
    if manifest.loader is None:
        raise UserError(
            f"the checkpoint of step {manifest.step} in {config.checkpoint_dir} was saved without "
            "the reader's state: a run cannot go on there"
        )
    reader.resume(manifest.loader)
    return manifest


def _start_from(config: RunConfig, trainer: Trainer) -> Manifest | None:
    """Another run's checkpoint that this one begins with, on data of its own."""
    from shardemb.build import best_step
    from shardemb.checkpoint.checkpoints import Checkpoints
    from shardemb.checkpoint.contents import find

    if config.checkpoint.start_from is None:
        return None
    found = find(config.checkpoint.start_from)
    manifest = Checkpoints(found.store.root).load(
        trainer, found.name, grow_tables=config.checkpoint.grow_tables
    )
    trainer.best = best_step(config)  # that run's best is none of this one's
    return manifest


def _train(
    config: RunConfig,
    trainer: Trainer,
    train_data: ParquetReader,
    others: dict[str, ParquetReader],
    directory: RunDirectory | None,
    checkpoints: Checkpoints,
    supervision: Supervision | None,
) -> dict[str, Any]:
    """Train and evaluate; the run's result."""
    last = trainer.last_step(train_data, config.train.epochs, config.train.max_steps)
    if config.checkpoint.every_steps or config.keeps_best:
        checkpoints.prepare(trainer)
    with _log(config, directory, last, trainer.step + 1) as log:
        progress = trainer.train(
            train_data,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            report_every=config.train.log_every,
            report=log.report if log else None,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every_steps,
            validation=_validation(config, others, log),
            supervision=supervision,
        )
        if supervision and supervision.has_stopped:
            raise StoppedError(
                f"stopped by SIGTERM after step {trainer.step}; {checkpoints.last_good()}: go on "
                "there with checkpoint.resume=latest"
            )
        if log and progress is None:
            log.begin()
        best = _restore_best(config, trainer, checkpoints)
        if log and "test" in others:
            log.evaluating()
        with trainer.wall_time.part("evaluation"):
            evaluation = trainer.evaluate(others["test"].epoch()) if "test" in others else None
        if log and evaluation:
            log.evaluated(evaluation, trainer.step)
        found = {"eval": evaluation.to_json() if evaluation else None}
        return {**_result(trainer, progress, checkpoints), **best, **found}


def _log(
    config: RunConfig, directory: RunDirectory | None, last: int, first: int
) -> RunLog | nullcontext[None]:
    if directory is None:
        return nullcontext()
    from shardemb.metrics.run_log import RunLog

    return RunLog(config, directory, last, first)


def _validation(
    config: RunConfig, others: dict[str, ParquetReader], log: RunLog | None
) -> Validation | None:
    from shardemb.trainer import Validation

    every, reader = config.evaluation.every_steps, others.get(config.evaluation.split)
    if every is None or reader is None:
        return None
    return Validation(reader, every, log.validated if log else None)


def _restore_best(config: RunConfig, trainer: Trainer, checkpoints: Checkpoints) -> dict[str, Any]:
    """Have the weights of the best step, where that is asked for; what result.json says of it."""
    from shardemb.build import tell
    from shardemb.checkpoint.checkpoints import BEST

    best, stopping = trainer.best, config.evaluation.early_stopping
    if best is None or best.step is None:
        return {}
    restores = stopping is not None and stopping.restore_best and checkpoints.best is not None
    if restores and best.step != trainer.step:
        tell(f"restoring step {best.step}")
        checkpoints.load(trainer, BEST, weights_only=True)
    step = {"step": best.step, "metric": best.metric, "value": best.value, "restored": restores}
    return {"best": step}


def _result(
    trainer: Trainer, progress: Progress | None, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Speed and loss are None where a run that went on had no step left to train."""
    plan = trainer.model.planner_plan
    assert checkpoints.names
    return {
        "steps": trainer.step,
        "samples": trainer.samples,
        "samples_per_second": progress.samples_per_second if progress else None,
        "data_wait_fraction": progress.data_wait_fraction if progress else None,
        "train_loss": progress.train_loss if progress else None,
        "dense_precision": trainer.dense_precision,
        "world_size": plan.topology.world_size,
        "plan_fingerprint": plan.fingerprint,
        "embeddings": _embeddings(trainer),
        "checkpoint": checkpoints.store.path(checkpoints.names[-1]),
        "seconds": split_training(trainer.wall_time.seconds(), trainer.clock.exchange_share),
        "restarts": trainer.wall_time.restarts,
        "straggler": asdict(progress.straggler) if progress and progress.straggler else None,
    }


def _embeddings(trainer: Trainer) -> dict[str, Any] | None:
    """What lookups and exchanges took, beside what the plan predicted; a collective."""
    from planner.comparison import Comparison
    from shardemb.profiler.environment import this_environment

    stages = trainer.clock.stages()
    if stages is None:
        return None
    return {
        **Comparison.of(trainer.model.planner_plan, stages).to_dict(),
        "steps": trainer.clock.steps,
        "environment": this_environment(trainer.device).model_dump(),
    }


def leave(code: int) -> NoReturn:
    """End at once: gloo's threads may still be freeing tensors, and one that does so after Python
    is gone aborts the process. It happened to one finished run in thirty."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
