"""What measurements were made on."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from planner.cost.measurements import Environment


def this_environment(device: torch.device) -> Environment:
    """The device, versions and threads of this process."""
    on_gpu = device.type == "cuda"
    return Environment(
        device_type="cuda" if on_gpu else "cpu",
        device_name=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        fbgemm=_fbgemm_version(),
        date=date.today().isoformat(),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.machine()


def _fbgemm_version() -> str:
    for package in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
