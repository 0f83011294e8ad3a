"""A Slurm batch script that runs `shardemb launch torchrun` on each of its hosts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from shardemb.config import RunConfig

PORT = 29500
# From SIGTERM to the end of the job's time: for the step that is under way and a checkpoint.
_NOTICE_SECONDS = 300


def slurm_script(config: RunConfig, config_path: str, overrides: Sequence[str], nnodes: int) -> str:
    """For `sbatch`. What depends on the cluster (partition, time, memory) is for its user to add.

    Slurm sends SIGTERM before the job's time ends (sbatch(1), --signal), and the run saves and
    stops; submitted again, it goes on, unless `overrides` say otherwise.
    """
    workers = config.launch.nproc_per_node
    overrides = ["checkpoint.resume=latest", *overrides]
    what = ["shardemb", "launch", "torchrun", config_path, *overrides, "--nnodes", str(nnodes)]
    room = "gpus-per-node" if config.launch.device == "cuda" else "cpus-per-task"
    return f"""#!/bin/bash
#SBATCH --job-name=shardemb
#SBATCH --nodes={nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --{room}={workers}
#SBATCH --signal=TERM@{_NOTICE_SECONDS}
set -euo pipefail
# Not `head`: it would end scontrol early, which pipefail takes for a failure.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun --kill-on-bad-exit=0 {shlex.join(what)} --rdzv-endpoint "$first:{PORT}"
"""
