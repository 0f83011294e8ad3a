"""One worker: `python -m shardemb.evaluate CONFIG CHECKPOINT RESULT [key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from shardemb.config import RunConfig, load_config
from shardemb.failure import report_failures
from shardemb.quiet import silence_libraries
from shardemb.run_directory import without_nan, write_json
from shardemb.train import leave

LATEST = "latest"


def main() -> int:
    with report_failures() as outcome:
        config_path, checkpoint, result, *overrides = sys.argv[1:]
        silence_libraries()
        run(load_config(config_path, overrides), checkpoint, Path(result))
    return outcome.exit_code


def run(config: RunConfig, checkpoint: str, result: Path) -> None:
    """Evaluate the weights of a checkpoint on the test split; rank 0 writes `result`."""
    import torch.distributed as dist

    from shardemb.build import build_reader, build_trainer, tell
    from shardemb.checkpoint.checkpoints import Checkpoints
    from shardemb.ranks import process_group
    from shardemb.warm_start import warm_start

    with process_group(config.launch.device) as device:
        reader = build_reader(config, "test")
        trainer = build_trainer(config, device)
        checkpoints = Checkpoints(config.checkpoint_dir)
        name = None if checkpoint == LATEST else checkpoint
        grow_tables = config.checkpoint.grow_tables
        manifest = checkpoints.load(trainer, name, weights_only=True, grow_tables=grow_tables)
        warm_start(config, trainer.model, manifest)
        tell(f"evaluating the checkpoint of step {manifest.step}")
        evaluation = trainer.evaluate(reader.epoch())
        if dist.get_rank() == 0:
            found = {"step": manifest.step, "eval": evaluation.to_json()}
            write_json(result, without_nan(found))


if __name__ == "__main__":
    leave(main())
