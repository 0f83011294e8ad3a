"""Imports packages in a process of its own, where a crash, an exception or a hang does no harm.

The child prints one JSON object per line as it learns things, so that what it knew before it
died is kept, and the last package it announced is the one that brought it down.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

# Imported in this order; what comes after a failure needs what failed, so the child stops there.
PROBED = ("torch", "fbgemm_gpu", "tensordict", "torchmetrics", "pyre_extensions", "torchrec")

# fbgemm_gpu imports without an error when it finds no libraries to load: its operators tell.
CHILD = """
import importlib, importlib.util, json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the packages print must not mix with the answers
def say(**fact):
    print(json.dumps(fact), file=out, flush=True)
def learn_devices(torch):
    cuda, dist = torch.cuda, torch.distributed
    names = []
    if cuda.is_available():
        names = [cuda.get_device_name(i) for i in range(cuda.device_count())]
    backends = ["gloo", "nccl", "mpi", "ucc"] if dist.is_available() else []
    backends = [b for b in backends if getattr(dist, f"is_{b}_available", bool)()]
    say(cuda_build=torch.version.cuda, cuda_devices=names, backends=backends)
def check_operators(torch):
    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(2, dtype=torch.int64))
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    if spec is None:
        say(failed=name, missing=True, why=f"finds no module {name}", origin=None)
        break
    say(importing=name, origin=spec.origin)
    try:
        module = importlib.import_module(name)
        if name == "torch":
            learn_devices(module)
        if name == "fbgemm_gpu":
            check_operators(importlib.import_module("torch"))
    except BaseException as error:
        say(failed=name, why=f"raises {type(error).__name__}: {error}"[:600])
        break
else:
    say(done=True)
out.flush()
os._exit(0)  # no teardown: a library's destructor is not what is asked about
"""


@dataclass(frozen=True)
class ImportFailure:
    module: str
    why: str
    origin: str | None
    missing: bool = False


@dataclass(frozen=True)
class Probe:
    """What the child found out. `cuda_build` is the CUDA version torch was built for, if any."""

    torch_imports: bool = False
    cuda_build: str | None = None
    cuda_devices: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    failure: ImportFailure | None = None


def probe_imports(timeout: float, modules: tuple[str, ...] = PROBED) -> Probe:
    command = [sys.executable, "-c", CHILD, *modules]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        facts = _facts(child.stdout)
        end = _how_it_ended(child.returncode, child.stderr)
    except subprocess.TimeoutExpired as expired:
        facts = _facts(expired.stdout)
        end = f"hangs: not finished after {timeout:g} s"
    return _probe(facts, end)


def _probe(facts: list[dict[str, Any]], end: str) -> Probe:
    merged: dict[str, Any] = {}
    for fact in facts:
        merged.update(fact)
    failure = None
    if "failed" in merged:
        missing = merged.get("missing", False)
        failure = ImportFailure(merged["failed"], merged["why"], merged["origin"], missing)
    elif "done" not in merged:
        failure = ImportFailure(merged.get("importing", "python"), end, merged.get("origin"))
    return Probe(
        torch_imports="backends" in merged,
        cuda_build=merged.get("cuda_build"),
        cuda_devices=merged.get("cuda_devices", []),
        backends=merged.get("backends", []),
        failure=failure,
    )


def _facts(output: str | bytes | None) -> list[dict[str, Any]]:
    # subprocess hands over bytes, whatever was asked for, when the time ran out
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _how_it_ended(returncode: int, stderr: str) -> str:
    if returncode < 0:
        return f"crashes the process ({signal.Signals(-returncode).name})"
    last = stderr.strip().splitlines()[-1:] or ["no message"]
    return f"ends the process with exit code {returncode} ({last[0][:300]})"
