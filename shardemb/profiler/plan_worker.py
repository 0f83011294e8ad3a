"""One rank that times plans: `shardemb.profiler.plan_worker DEVICE OUT REPETITIONS PLAN...`.

DEVICE is cpu, cuda or auto. Rank 0 appends a line of JSON to OUT for each plan: its stages on each
rank, and a step.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from planner import Plan
from shardemb.failure import report_failures
from shardemb.profiler.plan_timing import time_plan
from shardemb.quiet import silence_libraries
from shardemb.ranks import process_group
from shardemb.train import leave


def main(
    device_type: Literal["auto", "cpu", "cuda"], out: str, repetitions: str, *plans: str
) -> int:
    silence_libraries()
    # That a plan splits rows which share a momentum is told where it is trained.
    logging.getLogger("shardemb.sharding").setLevel(logging.ERROR)
    with report_failures() as outcome, process_group(device_type) as device:
        for path in plans:
            timing = time_plan(Plan.load(Path(path)), device, repetitions=int(repetitions))
            gc.collect()  # the tables: collectives keep modules in cycles
            if dist.get_rank() == 0:
                found = {
                    "plan": path,
                    "stages": timing.stages.tolist(),
                    "step": timing.step.median_ms,
                }
                with Path(out).open("a") as lines:
                    lines.write(json.dumps(found) + "\n")
    return outcome.exit_code


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))  # type: ignore[arg-type]
